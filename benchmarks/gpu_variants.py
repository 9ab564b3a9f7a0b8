"""Other ways to compute what `ttt` and `stream` compute, for gpu.py to time.

Each variant is a few context managers, entered with (device, backend of torch.compile), under which
train_gpt.py does something in another way. They are undone at their end. All of them score the same,
to within rounding. What wins on a GPU belongs into the script; the others stay here.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step import flash_attention

import train_gpt as tg

BLOCK = tg.Block.forward
UNFLATTEN = tg.DocumentAdapters.unflatten
ADAM = tg.DocumentAdapters.step

# ==== Blocks ======================================================================================
# What is compiled is a function of tensors that are not views: of a view torch.compile also takes
# the base, its strides and where in it the view begins for constants.


class Adapted(NamedTuple):
    """What `DocumentAdapters.unflatten` reads, for some of the layers."""

    adapted: tuple
    shapes: tuple
    dtype: torch.dtype
    layers: int


def unflatten_blocks(self: tg.DocumentAdapters, flat: Tensor) -> tg.Adapters:
    """As `unflatten`, but each block gets (a tensor of its own, how to unflatten it)."""
    count = 2 * len(self.adapted)
    block = Adapted(tuple(self.adapted), tuple(self.shapes[:count]), self.dtype, 1)
    head = Adapted((), tuple(self.shapes[count * self.layers :]), self.dtype, 0)
    sizes = [sum(shape.numel() for shape in block.shapes)] * self.layers
    rest = flat.size(1) - sum(sizes)
    *parts, last = flat.split([*sizes, rest], dim=1)
    blocks = []
    for part in parts:
        own = part.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        blocks.append((own, block))
    return tg.Adapters(blocks, UNFLATTEN(head, last).lm_head)


class OneLayer:
    """The cache of one layer. It does not outlive a call."""

    def __init__(self, past: Tensor, mask: Tensor):
        self.past = past
        self.mask = mask

    def extend(self, new: Tensor) -> Tensor:
        """As `KVCache.extend`; `past` is what the last call returned, (2, B, G, W + C, N)."""
        self.seen = torch.cat((self.past[..., new.size(3) :, :], new), dim=3)
        return self.seen


def run_block(
    block: tg.Block,
    x: Tensor,
    x0: Tensor,
    rope: Tensor,
    flat: Tensor,
    adapted: Adapted,
    past: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`Block.forward` without side effects. Also returns the keys and values that it saw."""
    lora = UNFLATTEN(adapted, flat).blocks[0]
    if past is None:
        return BLOCK(block, x, x0, rope, lora, None), None
    layer = OneLayer(past, mask)
    out = BLOCK(block, x, x0, rope, lora, layer)
    return out, layer.seen.detach()


def take_past(block: tg.Block, x: Tensor, cache: tg.KVCache) -> Tensor:
    """What the cache holds of its next layer, for as many rows as x has."""
    batch = len(x)
    if cache.layer not in cache.past:
        dim = block.attn.head_dim
        heads = block.attn.c_k.weight.size(0) // dim
        length = cache.window + cache.chunk
        cache.past[cache.layer] = x.new_zeros(2, batch, heads, length, dim)
    past = cache.past[cache.layer]
    return past[:, :batch].clone() if past.size(1) > batch else past


@contextlib.contextmanager
def compile_blocks(device: str, backend: str, mode: str | None = None) -> Iterator[None]:
    """Blocks that are compiled once for all layers, numbers of documents and lengths of windows.

    Only for conditions that learn. With mode reduce-overhead each shape is compiled by itself, and
    its kernels are launched as CUDA graphs.
    """
    run = torch.compile(run_block, backend=backend, mode=mode, fullgraph=True)

    def forward(self, x, x0, rope, lora, cache):
        learns = torch.is_grad_enabled()
        flat, adapted = lora
        past = mask = None
        if x is x0:
            # Or the first block, whose input has no gradient, would be compiled by itself.
            x = x.detach().requires_grad_(learns)
        dynamic = [(x, 0), (x0, 0), (flat, 0), (rope, 1)]
        if cache is None:
            rope = rope.clone()
            dynamic += [(x, 1), (x0, 1), (rope, 1)]
        else:
            mask = cache.mask
            past = take_past(self, x, cache)
            dynamic += [(past, 1), (mask, 0)]
        if mode is None:
            for tensor, dim in dynamic:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        elif cache.layer == 0:
            torch.compiler.cudagraph_mark_step_begin()
        # The stream learns from all chunks but the very last, which is not worth compiling for.
        function = run if learns or cache is None else run_block
        out, seen = function(self, x, x0, rope, flat, adapted, past, mask)
        if cache is not None:
            # The next turn's graphs write where this turn's results are.
            cache.past[cache.layer] = seen.clone() if mode else seen
            cache.layer += 1
        return out

    with (
        mock.patch.object(tg.Block, "forward", forward),
        mock.patch.object(tg.DocumentAdapters, "unflatten", unflatten_blocks),
        mock.patch.object(tg, "causal_attention", flash_attention),  # the same on GPUs
    ):
        yield


@contextlib.contextmanager
def graph_blocks(device: str, backend: str) -> Iterator[None]:
    """Compiled blocks of `stream` as CUDA graphs."""
    with compile_blocks(device, backend, "reduce-overhead"):
        yield


# ==== Attention and Adam ==========================================================================


@contextlib.contextmanager
def fuse_attention(device: str, backend: str) -> Iterator[None]:
    """Attention over the cache by torch's memory-efficient kernel."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        # Heads that share keys lie one below the other, since that kernel may have no groups.
        heads = k.size(1)
        queries = q.reshape(len(q), heads, -1, q.size(3))
        bias = mask.repeat(1, q.size(1) // heads, 1)[:, None].expand(-1, heads, -1, -1)
        return F.scaled_dot_product_attention(queries, k, v, attn_mask=bias).view(q.shape)

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if device == "cpu":
        kernels.append(SDPBackend.MATH)
    with sdpa_kernel(kernels), mock.patch.object(tg, "masked_attention", attention):
        yield


class Rows(NamedTuple):
    """What `DocumentAdapters.step` reads."""

    learner: tg.Learner
    chunk: int
    state: tg.AdapterState


@contextlib.contextmanager
def fuse_adam(device: str, backend: str) -> Iterator[None]:
    """The adapters' step as one compiled pass."""

    def update(state: tg.AdapterState, grad: Tensor, learner: tg.Learner, chunk: int):
        ADAM(Rows(learner, chunk, state), slice(None), grad)

    run = torch.compile(update, backend=backend, fullgraph=True)

    @torch.no_grad()
    def step(self, rows, grad):
        # Detached, rows of the state are no views.
        state = tg.AdapterState(*(tensor[rows].detach() for tensor in self.state))
        for tensor in (*state, grad):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        run(state, grad, self.learner, self.chunk)
        if not isinstance(rows, slice):
            for whole, part in zip(self.state, state, strict=True):
                whole[rows] = part

    with mock.patch.object(tg.DocumentAdapters, "step", step):
        yield


VARIANTS = {
    "eager": (),
    "blocks": (compile_blocks,),
    "graphs": (graph_blocks,),
    "sdpa": (fuse_attention,),
    "adam": (fuse_adam,),
    "all": (fuse_attention, fuse_adam, compile_blocks),
}


@contextlib.contextmanager
def varied(variant: str, device: str, backend: str) -> Iterator[None]:
    """Compute as one of VARIANTS does. What it compiled is forgotten."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        # What is cached for one kernel of attention would be taken for another, too.
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        for change in VARIANTS[variant]:
            stack.enter_context(change(device, backend))
        yield
