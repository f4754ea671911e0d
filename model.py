"""GPT-2 as OpenAI defined it, in one module.

    model = GPT(GPTConfig())                     # 124,439,808 parameters
    logits, loss = model(idx, targets)
    model = GPT.from_pretrained("gpt2")          # or any folder in the Hugging Face format

What is unusual here:
- The embedding may be padded to a rounder number of rows, which matrix products like. Padding is never
  seen from outside: it gets no probability mass, no gradient, no sampled id, no row in a saved file.
- Parameters carry the names of Hugging Face's `GPT2LMHeadModel`, with `nn.Linear`'s (out, in) layout;
  the four matrices a block that Hugging Face stores as `Conv1D`, (in, out), are transposed on the way.

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; code: openai/gpt-2.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

import hub
from cli import UserError

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FEW_ROWS = 16  # up to here a CPU is busier reading a matrix than multiplying by it
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that files may hold
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    padded_vocab_size: int = 0  # rows of the embedding matrix; 0: vocab_size

    @property
    def embedding_rows(self) -> int:
        return max(self.vocab_size, self.padded_vocab_size)


class Attention(Protocol):
    """Attention of another pattern than causal, over more than the tokens of one call."""

    def append(self, T: int, device: torch.device) -> Tensor:
        """Called once for T tokens a row; returns their positions, (B or 1, T)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Called for each layer with q, k and v of these tokens, (B, n_head, T, head size)."""


class KVCache:
    """Keys and values of the tokens that B rows have been through, up to `capacity` each, filled in place.

    `lengths[b]` counts the tokens of row b; rows may differ, as prompts do.
    """

    def __init__(self, n_layer: int, capacity: int, lengths: list[int]) -> None:
        self.capacity = capacity
        self.lengths = lengths
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def append(self, T: int, device: torch.device) -> Tensor:
        """Make ready for a forward pass over T more tokens a row; returns their positions, (B or 1, T)."""
        starts, self.lengths = self.lengths, [length + T for length in self.lengths]
        self.end = max(self.lengths)
        # Rows of one length write a slice and need no mask, unless several tokens join earlier ones.
        self.uniform = len(set(starts)) == 1
        self.start = starts[0]
        positions = torch.tensor(starts[:1] if self.uniform else starts, device=device)[:, None]
        self.positions = positions + torch.arange(T, device=device)
        self.causal = self.uniform and self.start == 0
        self.mask = None
        if not self.uniform or (T > 1 and self.start > 0):
            self.mask = torch.arange(self.end, device=device) <= self.positions[:, None, :, None]
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, (B, n_head, T, head size), and return causal attention of q over all there is."""
        if self.layers[layer] is None:
            # Zeros, not empty memory: a masked NaN would still spoil the weighted sum.
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        for stored, new in zip(self.layers[layer], (k, v), strict=True):
            if self.uniform:
                stored[:, :, self.start : self.end] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                stored[rows, :, self.positions] = new.transpose(1, 2)
        keys, values = (stored[:, :, : self.end] for stored in self.layers[layer])
        causal = self.causal and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, is_causal=causal)

    def row(self, b: int) -> "KVCache":
        """Row b alone, empty, in the same memory: for filling it anew."""
        alone = KVCache(len(self.layers), self.capacity, [0])
        alone.layers = [(keys[b : b + 1], values[b : b + 1]) for keys, values in self.layers]
        return alone


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` for x (..., in), by whatever way is fastest.

    For few rows on a CPU that is `weight @ xᵀ`: the libraries beneath torch take 2 to 3 times as long for
    `x @ weightᵀ`. A single row's product they give to one thread, unless it comes as a batch of parts.
    """
    rows = x.shape[:-1].numel()
    usual = rows > FEW_ROWS or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if usual or torch.is_grad_enabled():
        return layer(x)
    N, C = layer.weight.shape
    first = min(torch.get_num_threads(), N) if rows == 1 else 1
    parts = next(k for k in range(first, N + 1) if N % k == 0)
    weight = layer.weight.view(parts, N // parts, C)
    columns = x.reshape(rows, C).t().expand(parts, C, rows)
    if layer.bias is None:
        y = torch.bmm(weight, columns)
    else:
        y = torch.baddbmm(layer.bias.view(parts, N // parts, 1), weight, columns)
    return y.view(N, rows).t().reshape(*x.shape[:-1], N)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Attention | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = project(self.c_attn, x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in qkv)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        return project(self.c_proj, y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.c_proj, F.gelu(project(self.c_fc, x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Attention | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class ChunkedCrossEntropy(torch.autograd.Function):
    """The head and its loss, a chunk of positions at a time, the gradients taken along the way.

    The logits of a whole batch, their softmax and its gradient are the largest tensors of a small GPT-2 by
    far. Here only a chunk's logits exist at a time, and become their own gradient in place (the idea of
    Liger Kernel's fused linear cross-entropy, Hsu et al. 2024). Nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunks: int
    ) -> Tensor:
        """states (N, C), weight (rows, C), targets (N,) -> mean loss over targets that are not -100."""
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            count = (targets != -100).sum()
            loss = torch.zeros((), device=states.device)
            grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
            pieces = zip(states.chunk(chunks), targets.chunk(chunks), grad_states.chunk(chunks), strict=True)
            for x, target, grad_x in pieces:
                x = x.to(dtype)
                # A column a position: the libraries beneath torch are up to 1.5 times as fast that way round.
                logits = (w @ x.t()).float()
                logits[vocab_size:] = -math.inf
                known = (target != -100).to(logits.dtype)
                target = target.clamp_min(0)[None]
                largest, target_logit = logits.amax(dim=0), logits.gather(0, target).squeeze(0)
                probs = logits.sub_(largest).exp_()
                total = probs.sum(dim=0)
                loss += ((largest + total.log() - target_logit) * known).sum()
                if ctx.needs_input_grad[0]:  # not so in validation, where the weight still asks for one
                    # d loss / d logits = (softmax - one-hot) · known / count, a factor a column.
                    probs.div_(total).scatter_add_(0, target, torch.full_like(probs[:1], -1.0))
                    factor = (known / count)[:, None]
                    grad = probs.to(dtype)
                    grad_x.copy_((grad.t() @ w) * factor)
                    x = x * factor.to(dtype)
                    if dtype == weight.dtype:
                        grad_weight.addmm_(grad, x)
                    else:
                        grad_weight += grad @ x
        ctx.save_for_backward(grad_states, grad_weight)
        return loss / count

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grad_loss, grad_weight.mul_(grad_loss), None, None, None


def default_loss_chunks(n_tokens: int, device: torch.device) -> int:
    """Parts to compute the loss of `n_tokens` in: one on a GPU; of 512 tokens, the fastest, on a CPU."""
    return max(1, n_tokens // 512) if device.type == "cpu" else 1


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        """Weights are drawn on the CPU from torch's global generator: seed it for a repeatable start.

        Raises UserError where the heads do not divide the width.
        """
        super().__init__()
        if min(config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size) < 1:
            raise UserError(f"model shape: every size must be at least 1: {config}")
        if config.n_embd % config.n_head:
            raise UserError(
                f"--n-head {config.n_head} does not divide --n-embd {config.n_embd}: change one of them"
            )
        self.config = config
        # Built without memory first: the modules' own initial weights are drawn from the same generator, in
        # a number that depends on the padding.
        with torch.device("meta"):
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(config.embedding_rows, config.n_embd),
                    "wpe": nn.Embedding(config.block_size, config.n_embd),
                    "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                    "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5),
                }
            )
            self.lm_head = nn.Linear(config.n_embd, config.embedding_rows, bias=False)
        self.to_empty(device=torch.get_default_device())
        self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """normal(0, 0.02); positions 0.01; residual projections 0.02/sqrt(2·n_layer); biases 0, gains 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("wpe.weight"):
                parameter.normal_(0.0, 0.01)
            elif name.endswith("wte.weight"):
                # Drawn without the padding, so that a padded model starts from the same weights.
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

    def num_parameters(self) -> int:
        """Trainable numbers, the tied head counted once and padding not at all."""
        padding = (self.config.embedding_rows - self.config.vocab_size) * self.config.n_embd
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6N + 12·L·d·T.

        N leaves out the position embedding, which is only looked up; the second term is attention's two
        T×T products, not halved for causality (PaLM, Chowdhery et al. 2022, appendix B).
        """
        N = self.num_parameters() - self.transformer.wpe.weight.numel()
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * sequence_length

    def hidden(self, idx: Tensor, cache: Attention | None = None) -> Tensor:
        """Token ids (B, T) int64 -> the last layer's normalised states (B, T, n_embd).

        With a KVCache, the T tokens follow those that it holds, and join them there.
        """
        T = idx.shape[1]
        if cache is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into {self.config.block_size} positions")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.append(T, idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def head(self, states: Tensor) -> Tensor:
        """States (..., n_embd) of `hidden` -> next-token logits (..., vocab_size)."""
        return project(self.lm_head, states)[..., : self.config.vocab_size]

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss_chunks: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        """Next-token logits, and the loss if there are targets.

        idx, targets: int64 (B, T), T at most block_size; a target of -100 is ignored.
        Returns logits (B, T, vocab_size) and the mean cross-entropy in nats, a scalar in fp32 (or None).
        With targets and loss_chunks above 1, only that share of the logits exists at a time, and None is
        returned for them.
        """
        states = self.hidden(idx)
        if targets is not None and loss_chunks > 1:
            head = (self.lm_head.weight, targets.flatten(), self.config.vocab_size, loss_chunks)
            return None, ChunkedCrossEntropy.apply(states.flatten(0, 1), *head)
        logits = self.head(states)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return logits, loss

    # ---------------------------------------------------------------- generation

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
        temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens, then top_p the fewest
        whose probabilities reach p (Holtzman et al. 2020). A row that draws eos_token_id is finished.
        Returns int64 (B, T + n) with n at most max_new_tokens, finished rows filled up with eos_token_id;
        or, for a list, the B continued prompts as lists, each ending at its eos_token_id.
        """
        prompts = idx.tolist() if isinstance(idx, Tensor) else idx
        steps = list(self.stream(prompts, max_new_tokens, temperature, top_k, top_p, generator, eos_token_id))
        rows = [[*prompt, *(step[b] for step in steps)] for b, prompt in enumerate(prompts)]
        if isinstance(idx, Tensor):
            filled = [[eos_token_id if token is None else token for token in row] for row in rows]
            return torch.tensor(filled, dtype=torch.int64, device=idx.device)
        return [[token for token in row if token is not None] for row in rows]

    @torch.inference_mode()
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
        """Like `generate`, a token at a time: yields the new id of each of the B rows, None once finished.

        A row's draws come from a stream of its own, seeded from `generator` (a CPU generator; None: torch's)
        or given as one generator a row, so they do not depend on what else is in the batch. A row that has
        filled all positions goes on from the last half of them.
        """
        window = self.config.block_size
        rows = [list(prompt)[-window:] for prompt in prompts]
        if not all(rows):
            raise ValueError("a prompt needs at least one token")
        if not isinstance(generator, Sequence):
            seeds = torch.randint(2**63 - 1, (len(rows),), generator=generator).tolist()
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        longest = max(map(len, rows))
        cache = KVCache(self.config.n_layer, min(window, longest + max_new_tokens), [0] * len(rows))
        logits = self._prefill(rows, cache)
        finished = [False] * len(rows)
        for step in range(max_new_tokens):
            draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generator])
            ids = sample(logits, draws, temperature, top_k, top_p).tolist()
            yield [None if done else token for done, token in zip(finished, ids, strict=True)]
            finished = [done or token == eos_token_id for done, token in zip(finished, ids, strict=True)]
            if all(finished) or step == max_new_tokens - 1:
                return
            for b, row in enumerate(rows):
                if cache.lengths[b] == window:
                    row[:] = row[len(row) - window // 2 :]
                    if row:
                        self._prefill([row], cache.row(b))
                    cache.lengths[b] = len(row)
                row.append(ids[b])
            last = torch.tensor(ids, device=self.device)[:, None]
            logits = self.head(self.hidden(last, cache)[:, -1])

    def _prefill(self, rows: list[list[int]], cache: KVCache) -> Tensor:
        """Fill an empty cache with rows of any lengths; returns the logits after each, (B, vocab_size)."""
        lengths = [len(row) for row in rows]
        # Short rows are padded on the right: causal attention keeps the padding from what stands before it,
        # and what the padding leaves in the cache is overwritten before it can be seen.
        padded = [row + [0] * (max(lengths) - len(row)) for row in rows]
        states = self.hidden(torch.tensor(padded, device=self.device), cache)
        cache.lengths = lengths
        return self.head(states[torch.arange(len(rows)), torch.tensor(lengths) - 1])

    # ---------------------------------------------------------------- Hugging Face format

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, padded_vocab_size: int = 0) -> "GPT":
        """A model from a folder in the Hugging Face format, or from the Hub by name (`gpt2`, `USER/NAME`).

        Returns it in fp32 on the CPU. Raises UserError on what is missing, damaged or not a GPT-2.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            folder = _download(str(name_or_folder))
        config = _read_config(folder / "config.json", padded_vocab_size)
        tensors = _read_tensors(folder)
        # A config that lies could ask for any amount of memory: nothing is built that the file has not.
        vocabulary, positions = (tensors.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
        shapes = [None if t is None else tuple(t.shape) for t in (vocabulary, positions)]
        due = [(config.vocab_size, config.n_embd), (config.block_size, config.n_embd)]
        if shapes != due or config.n_layer > len(tensors):
            raise UserError(f"{folder}: config.json describes another shape of model than the weights have")
        with torch.device("meta"):  # without drawing first weights
            model = cls(config)
        model._copy_weights(tensors, folder)  # to nowhere: only names and shapes are looked at
        model.to_empty(device="cpu")
        model.lm_head.weight = model.transformer.wte.weight
        model._copy_weights(tensors, folder)
        return model

    def load_weights(self, folder: Path) -> None:
        """Read `model*.safetensors` of a folder in the Hugging Face format into this model, exactly.

        Raises UserError where a file is missing or damaged, or holds another shape of model.
        """
        self._copy_weights(_read_tensors(folder), folder)

    def _copy_weights(self, tensors: dict[str, Tensor], folder: Path) -> None:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                rows = parameter[: self.config.vocab_size] if name.endswith("wte.weight") else parameter
                tensor = tensors.get(name)
                if tensor is not None and tensor.dim() == 2 and name.endswith(CONV1D_WEIGHTS):
                    tensor = tensor.t()
                if tensor is None or tensor.shape != rows.shape or tensor.dtype not in WEIGHT_TYPES:
                    have = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                    raise UserError(
                        f"{folder}: {name} is {have}, not {tuple(rows.shape)}: this is another shape of model"
                    )
                rows.copy_(tensor)
                if rows is not parameter:
                    parameter[self.config.vocab_size :].zero_()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors (fp32), config.json and generation_config.json for transformers to read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, parameter in self.named_parameters():
            tensor = parameter.detach().float()
            if name.endswith("wte.weight"):
                tensor = tensor[: self.config.vocab_size]
            elif name.endswith(CONV1D_WEIGHTS):
                tensor = tensor.t()
            tensors[name] = tensor.cpu().contiguous()
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # the library makes it readable for its owner only
        for name, content in (
            ("config.json", self._huggingface_config()),
            ("generation_config.json", {"bos_token_id": 50256, "eos_token_id": 50256}),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _huggingface_config(self) -> dict[str, object]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.config.vocab_size,
            "n_positions": self.config.block_size,
            "n_ctx": self.config.block_size,
            "n_layer": self.config.n_layer,
            "n_head": self.config.n_head,
            "n_embd": self.config.n_embd,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "torch_dtype": "float32",
        }


def sample(
    logits: Tensor, draws: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Pick an id from each row of logits (B, vocab_size): its distribution, inverted at draws (B,) in [0, 1).

    Returns int64 (B,) on the CPU. See `GPT.generate` for temperature, top_k and top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1).cpu()
    vocab_size = logits.shape[-1]
    ids = None
    if top_k or (top_p is not None and top_p < 1):
        logits, ids = logits.topk(min(top_k or vocab_size, vocab_size), dim=-1)
    probs = F.softmax(logits.float() / temperature, dim=-1).cpu().double()
    if top_p is not None and top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        probs[before >= top_p] = 0
        probs[:, 0] = probs[:, 0].clamp_min(torch.finfo(probs.dtype).tiny)  # top_p 0 keeps the likeliest
    cdf = probs.cumsum(dim=-1)
    # The first place where the sum exceeds the draw: a token of probability 0 is never there.
    place = torch.searchsorted(cdf, (draws * cdf[:, -1])[:, None], right=True).clamp_max(cdf.shape[-1] - 1)
    return (place if ids is None else ids.cpu().gather(1, place)).squeeze(1)


def _download(name: str) -> Path:
    """A model's configuration and weights from the Hub, or from its local cache."""
    repo = f"openai-community/{name}" if name in OPENAI_MODELS else name
    files = ["config.json", "model*.safetensors"]
    with hub.explained(f"{name} (no such folder, so a name on the Hub)", "name a folder, or connect"):
        return Path(hub.patiently(lambda: snapshot_download(repo, allow_patterns=files)))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's `model*.safetensors`, by their names in GPT2LMHeadModel."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model.safetensors in it: name a run, a checkpoint or a GPT-2 folder")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= safetensors.torch.load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged: {error}: take another checkpoint") from error
    # OpenAI's own upload has no prefix, carries the causal masks, and leaves out the tied head.
    return {f"transformer.{name.removeprefix('transformer.')}": tensor for name, tensor in found.items()}


def _read_config(file: Path, padded_vocab_size: int) -> GPTConfig:
    """GPTConfig from a Hugging Face config.json; UserError where it describes something else than GPT-2."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        config = GPTConfig(
            block_size=int(raw["n_positions"]),
            vocab_size=int(raw["vocab_size"]),
            n_layer=int(raw["n_layer"]),
            n_head=int(raw["n_head"]),
            n_embd=int(raw["n_embd"]),
            padded_vocab_size=padded_vocab_size,
        )
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing: name a run, a checkpoint or a GPT-2 folder") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: not the configuration of a GPT-2 ({error!r})") from error
    # Each of these keys has GPT-2's own value as transformers' default.
    expected = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, allowed in expected.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{file}: {key} is {raw[key]!r}: this is not GPT-2's architecture")
    return config
