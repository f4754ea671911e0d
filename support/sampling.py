"""Sampling: a key/value cache, drawing a token, and streams of tokens.

A model here is anything with GPT's `config`, `device`, `hidden(idx, attention)` and `head(states)`.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import hardware, tokenizer
from support.linear import cast_once

SAMPLE_PROMPTS = ("Hello, I'm a language model,", "Hello, I'm a computer science student,")
SAMPLES_PER_PROMPT = 3


class KVCache:
    """Key/value cache for causal attention: B rows of up to `capacity` tokens each (see `model.Attention`).

    `lengths[b]` counts the tokens of row b. Rows may differ in length.
    """

    def __init__(self, n_layer: int, capacity: int, lengths: list[int]) -> None:
        self.capacity = capacity
        self.lengths = lengths
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def start(self, T: int, device: torch.device) -> Tensor:
        """Begin a forward pass over T more tokens per row. Returns their positions, (B or 1, T)."""
        starts, self.lengths = self.lengths, [length + T for length in self.lengths]
        self.end = max(self.lengths)
        # Rows of equal length write a slice and need no mask, unless several tokens join earlier ones.
        self.uniform = len(set(starts)) == 1
        self.begin = starts[0]
        positions = torch.tensor(starts[:1] if self.uniform else starts, device=device)[:, None]
        self.positions = positions + torch.arange(T, device=device)
        self.causal = self.uniform and self.begin == 0
        self.mask = None
        if not self.uniform or (T > 1 and self.begin > 0):
            self.mask = torch.arange(self.end, device=device) <= self.positions[:, None, :, None]
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, (B, n_head, T, head size). Returns causal attention of q over all stored tokens."""
        if self.layers[layer] is None:
            # Zeros rather than empty memory: a masked NaN would still spoil the weighted sum.
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        for stored, new in zip(self.layers[layer], (k, v), strict=True):
            if self.uniform:
                stored[:, :, self.begin : self.end] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                stored[rows, :, self.positions] = new.transpose(1, 2)
        keys, values = (stored[:, :, : self.end] for stored in self.layers[layer])
        causal = self.causal and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, is_causal=causal)

    def row(self, b: int) -> "KVCache":
        """Return an empty cache for row b alone, in the same memory."""
        alone = KVCache(len(self.layers), self.capacity, [0])
        alone.layers = [(keys[b : b + 1], values[b : b + 1]) for keys, values in self.layers]
        return alone


def prefill(model: nn.Module, rows: list[list[int]], cache: KVCache) -> Tensor:
    """Run prompts of any lengths through an empty cache. Returns the logits after each, (B, vocab_size)."""
    lengths = [len(row) for row in rows]
    # Short rows are padded on the right: causal attention hides the padding from the tokens before it, and
    # what it leaves in the cache is overwritten before it can be seen.
    padded = [row + [0] * (max(lengths) - len(row)) for row in rows]
    with hardware.attention_for_many_shapes(model.device):
        states = model.hidden(torch.tensor(padded, device=model.device), cache)
    cache.lengths = lengths
    return model.head(states[torch.arange(len(rows)), torch.tensor(lengths) - 1])


def decode_one_token(model: nn.Module, ids: list[int], cache: KVCache) -> Tensor:
    """Append one token to each row. Returns the logits after it, (B, vocab_size)."""
    last = torch.tensor(ids, device=model.device)[:, None]
    with hardware.attention_for_many_shapes(model.device):
        return model.head(model.hidden(last, cache)[:, -1])


def sample(
    logits: Tensor, draws: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw an id from each row of logits (B, vocab_size): invert its distribution at draws (B,) in [0, 1).

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
    # The first place where the sum exceeds the draw: never a token of probability 0.
    place = torch.searchsorted(cdf, (draws * cdf[:, -1])[:, None], right=True).clamp_max(cdf.shape[-1] - 1)
    return (place if ids is None else ids.cpu().gather(1, place)).squeeze(1)


@torch.inference_mode()
def stream(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    eos_token_id: int | None,
) -> Iterator[list[int | None]]:
    """Continue prompts token by token: see `GPT.stream`."""
    window = model.config.block_size
    rows = [list(prompt)[-window:] for prompt in prompts]
    if not all(rows):
        raise ValueError("a prompt needs at least one token")
    if not isinstance(generator, Sequence):
        seeds = torch.randint(2**63 - 1, (len(rows),), generator=generator).tolist()
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    longest = max(map(len, rows))
    cache = KVCache(model.config.n_layer, min(window, longest + max_new_tokens), [0] * len(rows))
    logits = prefill(model, rows, cache)
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
                    prefill(model, [row], cache.row(b))
                cache.lengths[b] = len(row)
            row.append(ids[b])
        logits = decode_one_token(model, ids, cache)


def draw_samples(model: nn.Module, seed: int) -> list[str]:
    """Sample text from the fixed prompts: 64 tokens each, top-k 50."""
    enc = tokenizer.get_encoding()
    prompts = [enc.encode_ordinary(prompt) for prompt in SAMPLE_PROMPTS for _ in range(SAMPLES_PER_PROMPT)]
    generator = torch.Generator().manual_seed(seed)
    end = tokenizer.END_OF_TEXT_ID
    with cast_once(model):
        rows = model.generate(prompts, 64, temperature=0.8, top_k=50, generator=generator, eos_token_id=end)
    return [enc.decode([token for token in row if token != end]) for row in rows]


def generate(
    model: nn.Module, idx: Tensor | Sequence[Sequence[int]], eos_token_id: int | None, **options: object
) -> Tensor | list[list[int]]:
    """Continue prompts to their end: see `GPT.generate`. `options` are those of `stream`."""
    prompts = idx.tolist() if isinstance(idx, Tensor) else idx
    steps = list(stream(model, prompts, eos_token_id=eos_token_id, **options))
    rows = [[*prompt, *(step[b] for step in steps)] for b, prompt in enumerate(prompts)]
    if isinstance(idx, Tensor):
        filled = [[eos_token_id if token is None else token for token in row] for row in rows]
        return torch.tensor(filled, dtype=torch.int64, device=idx.device)
    return [[token for token in row if token is not None] for row in rows]
