"""Does 16-bit rounding drown what consistency training learns from? Late in training student and target are so near
that their difference may be less than what rounding adds. Any CPU will do: the arithmetic is emulated, by rounding what
goes into and comes out of convolutions and attention, forwards and backwards, as a GPU does.

    python .github/precision.py train bf16 --seed 0 ...     # sct.py with this arithmetic: fp32, tf32, fp16 or bf16
    python .github/precision.py measure RUN                 # rounding over distance, by stage, of a run of it
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import sct

SCALE = common.LOSS_SCALE['fp16']
KINDS = 'tf32', 'fp16', 'bf16'


class Rounded(torch.autograd.Function):
    """x as `kind` can write it, in float32; its gradient likewise."""

    @staticmethod
    def forward(ctx, x, kind):
        ctx.kind = kind
        return rounded(x, kind)

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad * SCALE, ctx.kind) / SCALE, None


def rounded(x, kind):
    """The nearest numbers that `kind` can write; tf32 has 10 bits behind the point and the range of float32."""
    if kind == 'tf32':
        return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return x.to(common.DTYPES[kind]).float()


def emulate(kind, conv=F.conv2d, attention=F.scaled_dot_product_attention):
    """Makes convolutions and attention round as `kind` does; tf32 rounds what goes in, 16 bits what comes out, too."""
    enter = (lambda x: x) if kind == 'fp32' else (lambda x: Rounded.apply(x, kind))
    leave = enter if kind in ('fp16', 'bf16') else lambda x: x
    F.conv2d = lambda x, weight, bias=None, **more: leave(conv(enter(x), enter(weight), bias, **more))
    F.scaled_dot_product_attention = lambda *qkv: leave(attention(*map(enter, qkv)))


@torch.no_grad()
def measure(path, stages=9, n=256, real=False):
    """Median over n samples of |u_kind - u_fp32| / |u_fp32|, u = student - target. -> {kind: [of each stage of ECT]}

    real: this machine's own 16 bits instead of the emulated.
    """
    model = sct.load(path)
    args = common.argparse.Namespace(**model.config)
    data = common.load_data(args, torch.device('cpu'))
    x0, y = data.at(common.batch_indices(len(data.images), n, 0, 0), 'cpu')
    eps = common.randn(x0.shape, 'precision')
    t = sct.upper_level(common.randn((n,), 'precision', 'level'), args.P_mean, args.P_std)
    found = {kind: [] for kind in KINDS}
    for stage in range(stages):
        r, u = sct.lower_level(t, stage), {}
        for kind in 'fp32', *KINDS:
            emulate('fp32' if real else kind)
            net = common.network(model, kind if real else 'fp32')
            student, target = (sct.f(net, x0 + level[:, None, None, None] * eps, level, y) for level in (t, r))
            u[kind] = (student - target).flatten(1)                 # f is the identity at r = 0
        for kind in KINDS:
            found[kind].append(((u[kind] - u['fp32']).norm(dim=1) / u['fp32'].norm(dim=1)).median().item())
    emulate('fp32')
    return found


if __name__ == '__main__':
    command, what, *flags = sys.argv[1:]
    if command == 'measure':
        found = measure(what)
        print('stage' + ''.join(f'{kind:>10}' for kind in found))
        for stage, ratios in enumerate(zip(*found.values())):
            print(f'{stage:5}' + ''.join(f'{ratio:10.3g}' for ratio in ratios))
    else:
        emulate(what)
        sys.exit(common.run(sct.main, flags))
