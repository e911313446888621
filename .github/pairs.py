"""Three papers, ways to choose two points: draws `pairs.png`. `python .github/pairs.py [OUT.png]`, some ten seconds.

The data are two images of one number, -1 and +1: the trajectories of their probability flow ODE are known (grey).
Consistency training compares f at a point x_t with f at a point x_r of less noise; they should lie on one trajectory.
The scripts' own functions choose the two, from the same images, noise and levels in every panel. x_r is on the line
from x_t to an image x0_hat, which is

    IC    any: images and noise are independent             OT    that of the least transport cost, in a batch of 144
    GC    what the model sees in x_r: always (mu = 1), and by the exact f, which is the sign of x
    VC    any, but the noise is an encoder's: a linear one, trained for 600 steps together with a tiny f (beta 10).
          All noise together has deviation 0.74; independent noise of that deviation would be off by 0.242
    SCT   the mean of all images, given x_t

Tinted: what lies between line and trajectory. The number: root mean square of what x_r is off, over 14,400 pairs.
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import gc_ct
import sct
import vct

PANELS = dict(IC='independent', OT='optimal transport', GC='generator-induced', VC='variational noise',
              SCT='posterior mean')
INKS = ['#5b6573', '#5b6573', '#2563c9', '#d1541a', '#23863a']     # a colour for each paper; grey: what they start from
IMAGES = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
LEVELS = torch.tensor(gc_ct.rho_levels(20))             # iCT's, after they doubled once
SHOWN, SEED = range(5, 11), 69      # the gaps from 0.17 to 3.9; twelve pairs that lie apart, about as far off as all do


def flow(x, t, r, steps=32):
    """The trajectory through x (B, 1, 1, 1) from t to r (B,): dx / d ln t = x - E[x0|x]. -> levels, x (steps + 1, B)"""
    levels, points = t * (r / t) ** torch.linspace(0, 1, steps + 1)[:, None], [x]
    step = (r / t).log()[:, None, None, None] / steps
    for now, after in zip(levels[:-1], levels[1:]):
        slope = x - sct.posterior_mean(x, now, IMAGES)
        ahead = x + step * slope                                                                # Heun's method
        x = x + step * (slope + ahead - sct.posterior_mean(ahead, after, IMAGES)) / 2
        points.append(x)
    return levels, torch.stack(points).flatten(1)


def exact_network(x_in, c_noise, y=None):
    """F for which f(x, t) is where the trajectory through x ends: at the image of the same sign."""
    t, s = (4 * c_noise).exp().view_as(x_in), gc_ct.SIGMA_DATA
    x = x_in * (s ** 2 + t ** 2).sqrt()
    return (x.sign() - s ** 2 / (t ** 2 + s ** 2) * x) * (s ** 2 + t ** 2).sqrt() / (s * t)


def train_encoder(steps=600, beta=10.0):
    """VCT's encoder of the two images, trained together with f. -> function (x, c_noise, y)"""
    torch.manual_seed(0)
    emits, layers = nn.Conv2d(1, 2, 1), nn.Sequential(nn.Conv2d(2, 64, 1), nn.SiLU(), nn.Conv2d(64, 1, 1))
    encoder = lambda x, c_noise, y=None: emits(x)
    net = lambda x, c_noise, y=None: layers(torch.cat([x, c_noise.view_as(x)], 1))
    optimizer = torch.optim.Adam([*emits.parameters(), *layers.parameters()], 1e-2)
    table, x0 = vct.level_table(len(LEVELS), -1.1, 2.0), IMAGES.repeat(64, 1, 1, 1)
    for step in range(steps):
        t, r = vct.level_pair(common.rand((len(x0),), step, 'level'), *table)
        eps, kl = vct.emit(encoder, x0, common.randn(x0.shape, step, 'noise'))
        value = vct.loss(net, vct.path(x0, eps, t), t, vct.path(x0, eps, r), r, m=vct.SIGMA_MIN)
        optimizer.zero_grad()
        (value + vct.kl_weight(beta, LEVELS[-1], LEVELS[-2]) * kl).mean().backward()
        optimizer.step()
    return encoder


def draw(number, size=144):
    """A batch for all panels, as many of either image at each pair of levels. -> x0, eps (B, 1, 1, 1), t, r (B,)"""
    i = SHOWN.start + torch.arange(size) // 2 % len(SHOWN)
    return IMAGES.repeat(size // 2, 1, 1, 1), common.randn((size, 1, 1, 1), SEED, number), LEVELS[i + 1], LEVELS[i]


@torch.no_grad()
def choose(kind, x0, eps, t, r, encoder=None):
    """The pairs made of a batch. -> x0_hat (B,), levels t to r, the line x_t to x_r, the trajectory (steps + 1, B)"""
    if kind == 'OT':
        x0 = x0[gc_ct.optimal_transport(x0, eps)]
    if kind == 'GC':
        x0 = gc_ct.generator_coupling(exact_network, x0, eps, r, None, torch.ones(len(x0), dtype=torch.bool))
    if kind == 'VC':
        eps, _ = vct.emit(encoder, x0, eps)
    x_t = vct.path(x0, eps, t)
    x0_hat = (sct.posterior_mean(x_t, t, IMAGES) if kind == 'SCT' else x0).flatten()
    levels, exact = flow(x_t, t, r)
    return x0_hat, levels, sct.at_level(x0_hat, x_t.flatten(), t, levels), exact


def distance(kind, encoder=None, n=100):
    """Root mean square of the distance of x_r from the trajectory through x_t, over n batches."""
    pairs = [choose(kind, *draw(number), encoder) for number in range(n)]
    return torch.cat([line[-1] - exact[-1] for _, _, line, exact in pairs]).square().mean().sqrt().item()


def picture(encoder, n=100):
    """All panels and a legend, drawn at twice the size. -> image of 1200 x 600"""
    sheet, low, high = Image.new('RGB', (2400, 1200), 'white'), LEVELS[SHOWN.start], LEVELS[SHOWN.stop]
    grey = flow(torch.linspace(-2.6, 2.6, 34).view(-1, 1, 1, 1) * (1 + high ** 2).sqrt(), high.repeat(34), low, 200)
    pen = ImageDraw.Draw(sheet)
    text = lambda x, y, words, anchor='la', size=15, ink=INKS[0]: pen.text(
        (x, y), words, ink, ImageFont.load_default(2 * size), anchor, 14)

    def pair(line, exact, ink, x0_hat):
        pale = lambda share: tuple(round(255 + share * (c - 255)) for c in ImageColor.getrgb(ink))
        pen.polygon(line + exact[::-1], pale(0.35))
        pen.line(line, ink, 6, 'curve')
        pen.circle(line[0], 10, pale((x0_hat + 1) / 2), ink, 4)

    for number, (kind, ink) in enumerate(zip(PANELS, INKS)):
        left, top = 76 + number % 3 * 790, 92 + number // 3 * 590
        across = lambda t: left + 690 * (t ** (1 / 7) - low ** (1 / 7)) / (high ** (1 / 7) - low ** (1 / 7))
        place = lambda t, x: list(zip(across(t).tolist(), (top + 184 - 68 * x / (1 + t ** 2).sqrt()).tolist()))
        for trajectory in zip(*(rows.T for rows in grey)):
            pen.line(place(*trajectory), '#d0d4da', 3, 'curve')
        x0_hat, *rows = choose(kind, *draw(0), encoder)
        for i in reversed(range(2 * len(SHOWN))):                       # a dot over what ends there
            t, line, exact = (points[:, i] for points in rows)
            pair(place(t, line), place(t, exact), ink, x0_hat[i].item())
        for t in (0.2, 0.5, 1, 2, 3):
            text(across(torch.tensor(t)).item(), top + 376, 't = 1' if t == 1 else f'{t}', 'ma', 11)
        for image in (-1, 1):
            text(left - 12, top + 184 - 68 * image, f'{image:+d}', 'rm', 12)
        text(left, top - 76, f'{kind}: {PANELS[kind]}', 'la', 18, ink)
        text(left + 345, top + 420, f'x_r is off by {distance(kind, encoder, n):.3f}', 'ma', 15, ink)

    x, y = left + 790, top + 60                                                         # the legend, in the sixth place
    pair([(x + 560, y + 60), (x + 90, y)], [(x + 560, y + 60), (x + 90, y + 110)], INKS[0], 1)
    text(x + 584, y + 60, 'x_t', 'lm')
    text(x + 76, y, 'x_r', 'rm')
    text(x + 330, y + 100, 'trajectory', 'ma')
    text(x, y + 190, 'Grey: exact flow of two images, -1 and +1.\nDot: x_t. Its line goes to +1 (full), to -1\n'
         '(empty) or to a mean. Across: noise level.\nNumber: root mean square distance of x_r\nfrom the trajectory.')
    return sheet.resize((1200, 600), Image.Resampling.BOX)


if __name__ == '__main__':
    picture(train_encoder()).save((sys.argv[1:] or [Path(__file__).with_name('pairs.png')])[0], optimize=True)
