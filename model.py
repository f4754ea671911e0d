"""GPT-2 as OpenAI defined it.

    model = GPT(GPTConfig())                     # 124,439,808 parameters
    logits, _ = model(idx)
    _, loss = model(idx, targets)
    model = GPT.from_pretrained("gpt2")          # or any folder in the Hugging Face format

Unusual:
- The embedding has 50304 rows for 50257 ids, because GPUs are faster on multiples of 128. The padding is
  invisible from outside: no probability mass, no gradient, no sampled id, no row in a saved file.
- Parameters have the names of Hugging Face's `GPT2LMHeadModel`, with `nn.Linear`'s (out, in) layout.
- The loss can be computed in chunks, without the logits of a whole batch: support/loss.py.
- `model.recompute = True` is activation checkpointing: backward recomputes each block from its input.

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; code: openai/gpt-2.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support import pretrained, sampling
from support.cli import UserError
from support.layer_norm import LayerNorm
from support.linear import Linear
from support.loss import BlockCrossEntropy, RowCrossEntropy


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # of embeddings, attention probabilities, residual paths; transformers' GPT-2: 0.1

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding matrix: vocab_size, padded to a multiple of 128."""
        return -(-self.vocab_size // 128) * 128

    @property
    def n_parameters(self) -> int:
        """Number of parameters: embeddings, 12·d² + 13·d per block, the last LayerNorm.

        The head shares the weights of the embedding. Padding does not count.
        """
        d = self.n_embd
        return (self.vocab_size + self.block_size) * d + self.n_layer * (12 * d * d + 13 * d) + 2 * d

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6N + 12·L·d·T.

        N excludes the position embedding, which is only looked up. The second term counts the two T×T
        products of attention, not halved for causality (PaLM, Chowdhery et al. 2022, appendix B).
        """
        N = self.n_parameters - self.block_size * self.n_embd
        return 6 * N + 12 * self.n_layer * self.n_embd * sequence_length


class Attention(Protocol):
    """Replacement for plain causal attention in a forward pass: a KV cache, a context shared by endings."""

    def start(self, T: int, device: torch.device) -> Tensor:
        """Begin a forward pass over T tokens per row. Returns their positions, (B or 1, T)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in one layer: q, k, v and the result are (B, n_head, T, head size)."""


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014), active in training mode and only where gradients are enabled.

    Evaluations between steps run under no_grad, so they need not switch modes.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    @property
    def rate_now(self) -> float:
        return self.rate if self.training and torch.is_grad_enabled() else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Set each element of x (any shape) to 0 with probability `rate`, and divide the rest by 1 - rate."""
        return F.dropout(x, self.rate_now) if self.rate_now else x


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, T: int, attention: Attention | None = None) -> Tensor:
        """Attend within each of B sequences: x (N, C) with N = B·T -> (N, C)."""
        N, C = x.shape
        # Each (N, C) -> (B, T, n_head, head size) -> (B, n_head, T, head size).
        q, k, v = (
            t.view(N // T, T, self.n_head, C // self.n_head).transpose(1, 2)
            for t in self.c_attn(x).split(C, dim=1)
        )
        if attention is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.rate_now, is_causal=True)
        else:
            y = attention.attend(self.layer, q, k, v)
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(N, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, T: int, attention: Attention | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), T, attention)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        """Draw the weights on the CPU from torch's global generator; seed it for a repeatable start.

        Raises UserError if the heads do not divide the width.
        """
        super().__init__()
        self.recompute = False
        if min(config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size) < 1:
            raise UserError(f"model shape: every size must be at least 1: {config}")
        if config.n_embd % config.n_head:
            raise UserError(
                f"--n-head {config.n_head} does not divide --n-embd {config.n_embd}: change one of them"
            )
        self.config = config
        # Built on the meta device, so that the layers do not draw default weights. nn.Embedding would draw
        # even there, which imports torch.compile and takes a second.
        embedding = lambda *shape: nn.Embedding.from_pretrained(torch.empty(shape), freeze=False)  # noqa: E731
        with torch.device("meta"):
            self.transformer = nn.ModuleDict(
                {
                    "wte": embedding(config.embedding_rows, config.n_embd),
                    "wpe": embedding(config.block_size, config.n_embd),
                    "drop": Dropout(config.dropout),
                    "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                    "ln_f": LayerNorm(config.n_embd, eps=1e-5),
                }
            )
            self.lm_head = Linear(config.n_embd, config.embedding_rows, bias=False)
        self.to_empty(device=torch.get_default_device())
        self.tie_weights()
        if self.device.type != "meta":  # drawing nothing there would import torch.compile, for a second
            self._init_weights()

    def tie_weights(self) -> None:
        """Let the head share the token embedding's weights."""
        self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw weights from normal(0, 0.02), residual projections from normal(0, 0.02/sqrt(2·n_layer)).

        Biases are 0, LayerNorm weights 1. Positions are normal(0, 0.01), as in openai/gpt-2.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("wpe.weight"):
                parameter.normal_(0.0, 0.01)
            elif name.endswith("wte.weight"):
                parameter[: self.config.vocab_size].normal_(0.0, 0.02)
                parameter[self.config.vocab_size :].zero_()
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def hidden(self, idx: Tensor, attention: Attention | None = None) -> Tensor:
        """Compute the hidden states after the last LayerNorm: token ids (B, T) int64 -> (B, T, n_embd).

        attention: replaces plain causal attention and provides the positions of the tokens.
        """
        T = idx.shape[1]
        if attention is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into {self.config.block_size} positions")
        positions = (
            torch.arange(T, device=idx.device) if attention is None else attention.start(T, idx.device)
        )
        # (B·T, C) from here on, the shape of the matrix products. torch.compile only fuses operations of one
        # shape; this way backward writes the residual gradient and its 16-bit copy in one kernel.
        x = (self.transformer.wte(idx) + self.transformer.wpe(positions)).flatten(0, 1)
        x = self.transformer.drop(x)
        recompute = self.recompute and torch.is_grad_enabled()
        # A recomputed block needs the same dropout masks.
        options = {"use_reentrant": False, "preserve_rng_state": self.transformer.drop.rate_now > 0}
        for block in self.transformer.h:
            x = checkpoint(block, x, T, attention, **options) if recompute else block(x, T, attention)
        return self.transformer.ln_f(x).view(*idx.shape, -1)

    def head(self, states: Tensor) -> Tensor:
        """Map hidden states (..., n_embd) to next-token logits (..., vocab_size), without the padding."""
        return self.lm_head(states)[..., : self.config.vocab_size]

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss_chunks: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, None), or with targets (None, loss).

        idx, targets: int64 (B, T), T at most block_size; targets of -100 are ignored.
        logits: (B, T, vocab_size). loss: mean cross-entropy in nats, a scalar in fp32.
        loss_chunks: compute the loss in this many chunks of the batch, to save memory.
        """
        states = self.hidden(idx)
        if targets is None:
            return self.head(states), None
        # F.cross_entropy(self.head(states), targets), in pieces of the vocabulary on CPUs and of the batch on
        # GPUs. The compiler would unroll the former, and fuses the passes over a row by itself.
        in_blocks = states.device.type == "cpu" and not torch.compiler.is_compiling()
        cross_entropy = BlockCrossEntropy if in_blocks else RowCrossEntropy
        loss = cross_entropy.apply(
            states.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size, loss_chunks
        )
        return None, loss

    def generate(
        self,
        idx: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor | list[list[int]]:
        """Continue prompts by sampling.

        idx: int64 (B, T), or a list of B prompts of any lengths from 1 up.
        temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens, then top_p the smallest
        set of them whose probabilities add up to p (Holtzman et al. 2020). A row ends when it draws
        eos_token_id. Returns int64 (B, T + n) with n at most max_new_tokens, where rows that ended early are
        filled up with eos_token_id; for a list, returns B lists, each ending with its eos_token_id.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        return sampling.generate(self, idx, eos_token_id, max_new_tokens=max_new_tokens, **options)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        eos_token_id: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Generate token by token: yield the new id of each of the B rows, None for rows that have ended.

        Each row draws from its own generator: one of a list, or seeded from `generator` (on the CPU; None:
        torch's global one). So its tokens do not depend on the rest of the batch. A row that fills the
        context continues from the last half of its tokens.
        """
        options = (temperature, top_k, top_p, generator, eos_token_id)
        return sampling.stream(self, prompts, max_new_tokens, *options)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dropout: float | None = None) -> "GPT":
        """Load a model from a folder in the Hugging Face format, or from the Hub by its name.

        dropout: the rate in training. None: the rate in config.json, or 0 if that has several.
        The model is in fp32, on the CPU and in evaluation mode, as in transformers.
        Raises UserError on files that are missing, damaged or not a GPT-2.
        """
        own = {} if dropout is None else {"dropout": dropout}
        return pretrained.load(name_or_folder, lambda **config: cls(GPTConfig(**config | own))).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors (fp32) and its configuration, for transformers to read."""
        pretrained.save(Path(folder), pretrained.copy_weights(self), self.config)
