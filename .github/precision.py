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

SCALE = 1024                # of the loss in float16, as in common.LOSS_SCALE


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
    """Makes all convolutions and attention round as `kind` does; tf32 rounds what goes in, 16 bits what comes out, too."""
    enter = (lambda x: x) if kind == 'fp32' else (lambda x: Rounded.apply(x, kind))
    leave = enter if kind in ('fp16', 'bf16') else lambda x: x
    F.conv2d = lambda x, weight, bias=None, **more: leave(conv(enter(x), enter(weight), bias, **more))
    F.scaled_dot_product_attention = lambda *qkv: leave(attention(*map(enter, qkv)))


@torch.no_grad()
def measure(path):
    """Prints the median over 256 samples of |u_kind - u_fp32| / |u_fp32|, u = student - target, by stage of ECT."""
    model = sct.load(path)
    args = common.argparse.Namespace(**model.config)
    data = common.load_data(args, torch.device('cpu'))
    x0, y = data.at(common.batch_indices(len(data.images), 256, 0, 0), 'cpu')
    eps = common.randn(x0.shape, 'precision')
    t = sct.upper_level(common.randn((256,), 'precision', 'level'), args.P_mean, args.P_std)
    print('stage     ' + ''.join(f'{kind:>10}' for kind in ('tf32', 'fp16', 'bf16')))
    for stage in range(9):
        r, found = sct.lower_level(t, stage), {}
        for kind in common.DTYPES:
            emulate(kind)
            net = common.network(model, 'fp32')
            u = [sct.f(net, x0 + level[:, None, None, None] * eps, level, y) for level in (t, r)]
            found[kind] = torch.where(r[:, None] > 0, u[0].flatten(1) - u[1].flatten(1), (u[0] - x0).flatten(1))
        ratios = [(found[kind] - found['fp32']).norm(dim=1) / found['fp32'].norm(dim=1) for kind in
                  ('tf32', 'fp16', 'bf16')]
        print(f'{stage:5}     ' + ''.join(f'{ratio.median().item():10.3g}' for ratio in ratios))


if __name__ == '__main__':
    command, what, *flags = sys.argv[1:]
    if command == 'measure':
        measure(what)
    else:
        emulate(what)
        sys.exit(common.run(sct.main, flags))
