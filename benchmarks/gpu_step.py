"""Stage 2's step at Stable Diffusion 1 size, priced kernel by kernel on an H200 without having one.

python benchmarks/gpu_step.py [--batch 64] [--micro-batch 64] [--checkpointing] [--rows 12]

The step is the project's own: `computing_with`, loss, backward pass, clipping, AdamW, EMA, with fake tensors, which
have shapes and no values. A kernel takes the longer of its arithmetic at 790 TFLOP/s and its bytes at 4.3 TB/s (both
measured on an H200), each tensor read or written once: a bound that real kernels do not reach. What is modelled:

- CUDA's rules in place of the CPU's that fake tensors have: norms in float32 under autocast; an eager GroupNorm makes
  NCHW of channels_last; convolutions work in channels_last and change what has another layout; a bias is added by
  another kernel; a backward convolution is two kernels and a sum for the bias, one of fused attention three; the
  multi-tensor kernels take 30 to 110 tensors and 320 blocks of 65,536 values in one launch.
- Compiled code: torch.compile's own graphs, after its decompositions and its choice of what to compute again in the
  backward pass. Convolutions, products and attention stay kernels of their own. Of the rest only reductions, what such
  kernels and what is outside the graph read, and what reads more than four tensors for several others are written to
  memory. What depends on each other without a reduction between, or reads the same tensor, is one kernel. A reduction
  over rows of at most 8,192 values (LayerNorm) goes on in the same kernel, any other ends it. Reductions over different
  axes are different kernels, which read their inputs again, but for columns beside rows (mix_order_reduction); a
  long one to few values takes two. Inductor fuses a little
  more (a GroupNorm in one kernel) and, where its heuristics refuse, less.
- Not modelled: the frozen encoders (their output is cached), reading, random numbers, and what the host costs.

`blocks` compiles ResNet blocks and transformers, `step` the whole network; CUDA graphs, which `step` has on a GPU
with bf16 weights, start all kernels of a pass by one launch of the host.
"""

import argparse
import collections
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from latentdiff.config import OptimizerConfig, TrainConfig, UNetTrainingConfig, load_config
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models import compiling, layers
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.unet import UNet
from latentdiff.training import computing
from latentdiff.training.ema import EMA
from latentdiff.training.optimizer import build_optimizer

FLOPS, BANDWIDTH = 790e12, 4.3e12
ROW = 8192  # values of a row that one kernel reduces and goes on with
MOST_READS = 4  # of what is computed again for each of its readers: Inductor's realize_reads_threshold
LARGE = 2**12  # bytes that are worth to be read by one kernel instead of two
SETTINGS = [(weights, how) for weights in ("float32", "bf16") for how in ("off", "blocks", "step")]
aten = torch.ops.aten
FREE = {"detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE |= {"_unsafe_view", "device", "dim", "sym_size", "is_contiguous"}
HEAVY = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
REDUCTIONS = {"sum", "mean", "var_mean", "var", "amax", "native_group_norm", "native_layer_norm", "linalg_vector_norm"}


class Bill:
    """Kernels by name: launches, FLOPs, bytes and seconds."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])

    def add(self, name: str, flops: float, size: float, launches: int = 1) -> None:
        row = self.rows[name]
        for i, value in enumerate((launches, flops, size, max(flops / FLOPS, size / BANDWIDTH))):
            row[i] += value

    def add_all(self, other: "Bill") -> None:
        for name, values in other.rows.items():
            for i, value in enumerate(values):
                self.rows[name][i] += value

    def total(self, column: int) -> float:
        return sum(row[column] for row in self.rows.values())


def size_of(*trees: Any) -> int:
    """Bytes of the distinct tensors."""
    tensors = {id(t): t for t in tree_leaves(trees) if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def is_attention(name: str) -> bool:
    return name.startswith("_scaled_dot_product")


def heavy_kernels(bill: Bill, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, eager: bool) -> None:
    """Convolutions, products and attention, with what CUDA's eager ones do besides."""
    if is_attention(name):
        backward = "backward" in name
        q, k = args[1:3] if backward else args[:2]
        flops = (10 if backward else 4) * q.numel() * k.shape[2]
        bill.add(name, flops, size_of(args, out), 3 if backward else 1)
        return
    packet = getattr(aten, name)
    if name == "convolution":
        x, weight, bias = args[:3]
        _layouts(bill, (x,), weight, eager)
        bill.add(name, flop_registry[packet](*args, out_val=out), size_of(x, weight, out))
        if eager and bias is not None:
            bill.add("bias of a convolution", 0, 2 * size_of(out))
    elif name == "convolution_backward":
        upstream, x, weight = args[:3]
        _layouts(bill, (upstream, x), weight, eager)
        mask = list(args[10])
        for kind, wanted in (("input", (True, False, False)), ("weight", (False, True, False))):
            if mask[wanted.index(True)]:
                gradient = out[wanted.index(True)]
                flops = flop_registry[packet](*args[:10], wanted, out_val=_only(out, wanted))
                read = weight if kind == "input" else x
                bill.add(f"convolution, gradient of the {kind}", flops, size_of(upstream, read, gradient))
        if mask[2]:
            bill.add("bias of a convolution, gradient", 0, size_of(upstream))
    else:
        bill.add("product", flop_registry[packet](*args, **kwargs, out_val=out), size_of(args, kwargs, out))


def _only(out: Any, mask: tuple[bool, bool, bool]) -> tuple[Any, ...]:
    return tuple(value if wanted else None for value, wanted in zip(out, mask, strict=True))


def _layouts(bill: Bill, tensors: tuple[Tensor, ...], weight: Tensor, eager: bool) -> None:
    """Compiled code makes its tensors in the layout that they are wanted in."""
    for tensor in tensors if eager and weight.shape[2] > 1 else ():
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            bill.add("layout of a convolution's input", 0, 2 * size_of(tensor))


class Eager(TorchDispatchMode):
    """Bills each operator as CUDA would run it, unless compiled code runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bill = Bill()
        self.compiled = 0
        self.graphs = 0  # runs of compiled graphs
        self.in_graphs = 0.0  # their kernels

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Else torch.compile does nothing under this mode."""
        return True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._overloadpacket.__name__
        if self.compiled or function.is_view or name in FREE or function.namespace == "prim":
            return out
        if name in HEAVY or is_attention(name):
            heavy_kernels(self.bill, name, args, kwargs, out, eager=True)
        elif name.startswith(("_foreach", "_fused")):
            self.bill.add(name, 0, foreach_bytes(name, args), foreach_launches(name, args))
        else:
            label = name if name != "_to_copy" else f"cast of {'an activation' if args[0].ndim > 2 else 'a weight'}"
            if name == "_to_copy" and out.ndim == 4 and out.shape[2] in (1, 3):
                label = "cast of a weight"
            self.bill.add(label, 0, size_of(args, kwargs, out))
        return out


def foreach_launches(name: str, args: tuple[Any, ...]) -> int:
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    depth = 4 if name.startswith("_fused") else min(4, len(lists))
    most = {1: 110, 2: 64, 3: 48, 4: 36}[depth]
    blocks = sum(math.ceil(t.numel() / 65536) for t in lists[0])
    return max(math.ceil(len(lists[0]) / most), math.ceil(blocks / 320))


def foreach_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Each list is read, and those that change are written."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    if name.startswith("_fused"):  # parameters, gradients, two moments, counters; all but gradients and counters change
        return size_of(*lists) + size_of(lists[0], *lists[2:4])
    if name.startswith("_foreach_norm"):
        return size_of(lists[0])
    return size_of(*lists[1:]) + size_of(lists[0]) * (1 if name.startswith("_foreach_copy") else 2)


# ----------------------------------------------------------------------------------------------------------------------
# Compiled graphs


def price(graph: fx.Graph) -> Bill:
    """The kernels of a graph of torch.compile."""
    bill = Bill()
    root: dict[fx.Node, fx.Node] = {}  # whose memory a node shows
    operators: list[fx.Node] = []
    for node in graph.nodes:
        root[node] = node
        if node.op != "call_function" or not isinstance(_value(node), Tensor | tuple | list):
            continue
        if node.target.is_view if isinstance(node.target, torch._ops.OpOverload) else _name(node) == "getitem":
            root[node] = root[node.all_input_nodes[0]]
        elif _name(node) not in FREE:
            operators.append(node)
    known = set(operators)
    sources = {node: list(dict.fromkeys(root[n] for n in node.all_input_nodes)) for node in graph.nodes}
    users: dict[fx.Node, set[fx.Node]] = collections.defaultdict(set)
    for node in graph.nodes:
        if node in known or node.op == "output":
            for source in sources[node]:
                users[source].add(node)

    # What is written to memory; everything else is computed where it is read.
    reads: dict[fx.Node, list[fx.Node]] = {}
    written: set[fx.Node] = set()
    for node in operators:
        found: dict[fx.Node, None] = {}
        for source in sources[node]:
            inlined = source in known and source not in written
            found |= dict.fromkeys(reads[source] if inlined else [source])
        reads[node] = list(found)
        wanted = any(user.op == "output" or _is_heavy(user) for user in users[node])
        if wanted or _is_heavy(node) or _reduces(node) or (len(users[node]) > 1 and len(reads[node]) > MOST_READS):
            written.add(node)

    level: dict[fx.Node, int] = {}
    fused: list[fx.Node] = []
    for node in operators:
        if node in written:
            level[node] = max((level.get(n, 0) + int(_ends(n, node)) for n in reads[node]), default=0)
            if _is_heavy(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
                heavy_kernels(bill, _name(node), args, dict(kwargs), _value(node), eager=False)
            else:
                fused.append(node)
    readers: dict[fx.Node, set[fx.Node]] = collections.defaultdict(set)
    for node in graph.nodes:
        for source in sources[node] if node.op == "output" else reads[node] if node in written else []:
            readers[source].add(node)
    for group in _groups(fused, level, reads):
        for kernel in _kernels(group):
            read = {n for node in kernel for n in reads[node]} - set(kernel)
            label = "fused with a reduction" if any(map(_reduces, kernel)) else "fused, without a reduction"
            kept = [n for n in kernel if readers[n] - set(kernel)]
            size = sum(size_of(_value(n)) for n in [*read, *kept])
            bill.add(label, 0, size, 2 if any(map(_is_split, kernel)) else 1)
    return bill


def _is_heavy(node: fx.Node) -> bool:
    return node.op == "call_function" and (_name(node) in HEAVY or is_attention(_name(node)))


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target._overloadpacket.__name__ if hasattr(target, "_overloadpacket") else getattr(target, "__name__", "")


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _reduces(node: fx.Node) -> bool:
    return node.op == "call_function" and _name(node) in REDUCTIONS


def _ends(node: fx.Node, reader: fx.Node) -> bool:
    """Whether the reader can't be in the node's kernel: that is a heavy one, or a reduction not over rows.

    What is done with each of its results is.
    """
    return _is_heavy(node) or (_reduces(node) and not _over_rows(node) and _numel(reader) > _numel(node))


def _numel(node: fx.Node) -> int:
    """Values of the (first) result."""
    value: Any = _value(node)
    return (value[0] if isinstance(value, tuple | list) else value).numel()


def _axes(node: fx.Node) -> tuple[int, ...]:
    value: Any = _value(node.all_input_nodes[0])
    given = node.args[1] if len(node.args) > 1 else None
    axes = range(value.ndim) if given is None else [given] if isinstance(given, int) else given
    return tuple(axis % value.ndim for axis in axes)  # pyright: ignore[reportOperatorIssue]


def _over_rows(node: fx.Node) -> bool:
    value: Any = _value(node.all_input_nodes[0])
    return _axes(node) == (value.ndim - 1,) and value.shape[-1] <= ROW


def _is_split(node: fx.Node) -> bool:
    """A reduction of much to little, for which one block for each result would leave the GPU idle."""
    if not _reduces(node):
        return False
    results = _numel(node)
    return results <= 8192 and _numel(node.all_input_nodes[0]) >= 4096 * results


def _groups(
    fused: list[fx.Node], level: dict[fx.Node, int], reads: dict[fx.Node, list[fx.Node]]
) -> list[list[fx.Node]]:
    """Nodes of one level that depend on each other or read the same large tensor."""
    parent = {node: node for node in fused}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    readers: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in fused:
        for source in reads[node]:
            if source in parent and level[source] == level[node]:
                parent[find(node)] = find(source)
            if size_of(_value(source)) > LARGE:
                other = readers.setdefault((source, level[node]), node)
                parent[find(node)] = find(other)
    groups: dict[fx.Node, list[fx.Node]] = collections.defaultdict(list)
    for node in fused:
        groups[find(node)].append(node)
    return list(groups.values())


def _kernels(group: list[fx.Node]) -> list[list[fx.Node]]:
    """A kernel for the reductions over each set of axes; the first one writes what is no reduction."""
    kinds: dict[Any, list[fx.Node]] = collections.defaultdict(list)
    for node in group:
        if _reduces(node):
            kinds["rows" if _over_rows(node) else (_numel(node.all_input_nodes[0]), _numel(node))].append(node)
    if "rows" in kinds:  # sums over columns of the same tensor are made beside those over rows
        size = _numel(kinds["rows"][0].all_input_nodes[0])
        for key in [key for key in kinds if key != "rows" and key[0] == size]:
            kinds["rows"] += kinds.pop(key)
    kernels = list(kinds.values()) or [[]]
    kernels[0] = kernels[0] + [node for node in group if not _reduces(node)]
    return kernels


# ----------------------------------------------------------------------------------------------------------------------
# The step


def backend(mode: Eager) -> Callable[..., Any]:
    """A backend of torch.compile that bills a graph each time it runs, and runs it with fake tensors."""

    def compiler(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        bill = price(module.graph)

        def run(*inputs: Any) -> Any:
            mode.bill.add_all(bill)
            mode.graphs += 1
            mode.in_graphs += bill.total(0)
            mode.compiled += 1
            try:
                return module.forward(*inputs)
            finally:
                mode.compiled -= 1

        return make_boxed_func(run)

    return aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )


@contextlib.contextmanager
def as_on_cuda(autocast: bool) -> Iterator[None]:
    """CUDA's norms, attention, 1x1 convolutions and upsampling, where the CPU has others."""
    group_norm, layer_norm = F.group_norm, F.layer_norm

    def single(*tensors: Any) -> list[Any]:
        return [t.float() if autocast and t is not None else t for t in tensors]

    def norm_of_groups(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        x, weight, bias = single(x, weight, bias)
        if torch.compiler.is_compiling():
            return group_norm(x, groups, weight, bias, eps)
        return group_norm(x.contiguous(), groups, weight, bias, eps)

    def norm_of_rows(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        x, weight, bias = single(x, weight, bias)
        return layer_norm(x if torch.compiler.is_compiling() else x.contiguous(), shape, weight, bias, eps)

    with (
        patch.object(F, "group_norm", norm_of_groups),
        patch.object(F, "layer_norm", norm_of_rows),
        patch.object(layers, "plain_attention_is_faster", lambda *_, **__: False),
        patch.object(layers, "multiplies_tokens", lambda _: False),
        patch.object(layers, "transposes_upsampling", lambda _: False),
    ):
        yield


def step_bill(config: UNetTrainingConfig, train: TrainConfig, batch: int, micro: int) -> tuple[Bill, float]:
    """Of one optimiser step with this train.weights and train.compile; and launches by the host, with CUDA graphs."""
    torch._dynamo.reset()
    mode = Eager()
    kind = backend(mode)

    def compiled(network: nn.Module, how: Any, **_: Any) -> None:
        compiling.compile_network(network, how, backend=kind)

    autocast = train.weights == "float32"
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, as_on_cuda(autocast), patch.object(computing, "compile_network", compiled):
        unet = UNet(config.model)
        unet.enable_gradient_checkpointing(train.gradient_checkpointing)
        network = TextConditionedUNet(unet, None)
        for module in network.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and p.ndim == 4:  # fake tensors cannot be moved in place
                    module._parameters[name] = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
        model = computing.computing_with(network, train)
        ema, optimizer = EMA(network), build_optimizer(network, OptimizerConfig(lr=1e-4))
        side = config.data.shape[0] // 8
        latents = torch.zeros(micro, 4, side, side)
        context = torch.zeros(micro, 77, config.model.cross_attention_dim)
        timesteps = torch.zeros(micro, dtype=torch.long)
        for step in range(2):  # the first one compiles and makes the optimiser's state
            mode.bill, mode.graphs, mode.in_graphs = Bill(), 0, 0.0
            with mode:
                for _ in range(batch // micro):
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        losses = diffusion_loss(model, NoiseSchedule(), latents, context, latents, timesteps)
                    (losses.mean() * (micro / batch)).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)  # as on CUDA
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ema.update(network, 0.99)
            assert step or mode.bill.rows
    has_cuda_graphs = train.weights == "bf16" and train.compile == "step"
    return mode.bill, mode.bill.total(0) - (mode.in_graphs - mode.graphs if has_cuda_graphs else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).parents[1] / "configs/systems/pokemon-512/unet.yaml"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, help="by default the batch")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rows", type=int, default=0, help="kernels to list of each setting")
    parser.add_argument("--settings", nargs="+", help="such as bf16/step; by default all")
    given = parser.parse_args()
    micro = given.micro_batch or given.batch
    config = load_config(UNetTrainingConfig, given.config)
    print(f"batch {given.batch}, micro-batch {micro}\n")
    heads = ["weights", "compile", "ms", "images/s", "kernels", "launches by the host", "casts", "layout changes", "GB"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    details = []
    for weights, how in SETTINGS:
        if given.settings and f"{weights}/{how}" not in given.settings:
            continue
        changes = {"weights": weights, "compile": how, "gradient_checkpointing": given.checkpointing}
        bill, by_host = step_bill(config, config.train.model_copy(update=changes), given.batch, micro)
        seconds, rows = bill.total(3), bill.rows
        casts = sum(row[0] for name, row in rows.items() if name.startswith("cast"))
        layout = sum(row[0] for name, row in rows.items() if name.startswith(("layout", "clone")))
        cells = [f"{1e3 * seconds:.0f}", f"{given.batch / seconds:.0f}", f"{bill.total(0):,.0f}", f"{by_host:,.0f}"]
        print(
            f"| {weights} | {how} | {' | '.join(cells)} | {casts:.0f} | {layout:.0f} | {bill.total(2) / 1e9:.0f} |",
            flush=True,
        )
        if given.rows:
            listed = sorted(rows.items(), key=lambda item: -item[1][3])[: given.rows]
            details.append(f"\n{weights}, {how}\n\n| kernel | launches | TFLOP | GB | ms |\n|---|---|---|---|---|")
            for name, (launches, flops, size, time) in listed:
                details.append(
                    f"| {name} | {launches:.0f} | {flops / 1e12:.1f} | {size / 1e9:.1f} | {1e3 * time:.1f} |"
                )
    print("\n".join(details))


if __name__ == "__main__":
    sys.exit(main())
