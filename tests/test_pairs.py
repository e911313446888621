"""The figure of pairs: what its panels say of the ways to choose two points holds, by formulas of its two images."""
import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location('pairs', Path(__file__).parent.parent / '.github/pairs.py')
pairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pairs)


@pytest.fixture(scope='module')
def encoder():
    pytest.importorskip('scipy')                                # for optimal transport
    return pairs.train_encoder(steps=200)


def test_the_pairs_are_what_the_panels_say(encoder):
    x0, eps, t, r = pairs.draw(0)
    chosen = {kind: pairs.choose(kind, x0, eps, t, r, encoder) for kind in pairs.PANELS}
    x0, eps, ends, lines = x0.flatten(), eps.flatten(), *({kind: c[i] for kind, c in chosen.items()} for i in (0, 2))
    x_t, x_r = lines['SCT'][[0, -1]]
    torch.testing.assert_close((x_t - x_r) / (t - r), (x_t - (x_t / t ** 2).tanh()) / t, rtol=0, atol=1e-4)
    torch.testing.assert_close(ends['GC'], (x0 + r * eps).sign())                       # an image, and the right one
    assert torch.equal(ends['IC'], x0) and (ends['OT'] - eps).square().sum() < 0.6 * (x0 - eps).square().sum()
    noise = (lines['VC'][0] - x0) / t
    assert (noise * x0).mean() > (eps * x0).mean() + 0.15                               # on the side of its image
    off = {kind: pairs.distance(kind, encoder, 5) for kind in pairs.PANELS}
    assert off['SCT'] < 0.25 * off['IC'] and all(off[kind] < 0.9 * off['IC'] for kind in ('OT', 'GC', 'VC'))
