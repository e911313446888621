"""vct.py against the losses and the sampler of VCT's published code (`vct_losses.npz`: sony/vct), and Fashion-MNIST.
What is as in the other scripts: test_shared.py."""
import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import vct
from conftest import TINY_NETWORK, Script, all_shapes, analysed, close, draws, lines, model_of, toy, weights, wide

pytestmark = pytest.mark.usefixtures('few_shapes')
GOLDEN = np.load(Path(__file__).parent / 'data/vct_losses.npz')
VCT = Script('vct')


def tensor(name):
    return torch.from_numpy(GOLDEN[name])


def toy_encoder(x_in, c_noise, y=None):
    assert torch.equal(c_noise, torch.zeros(len(x_in)))
    return torch.cat([0.3 * x_in, 0.5 * x_in - 1.0], 1)


CASES = sorted(name.removesuffix(':eps') for name in GOLDEN.files
               if name.endswith(':eps') and not name.startswith('sample'))
PUBLISHED = {'ict': vct.PRESETS['cifar10', 'ict'], 'ecm_cifar': vct.PRESETS['cifar10', 'ecm'],
             'ecm_imagenet': vct.PRESETS['imagenet64', 'ecm'] | dict(beta=10.0)}


def levels(args, name, step):
    if args.base == 'ict':
        n, low, high = int(GOLDEN[f'{name}:num_timesteps']), 0.002 ** (1 / 7), 80 ** (1 / 7)
        rounded = (low + torch.arange(n) / (n - 1) * (high - low)) ** 7     # in float32: costs gaps of 1281 levels 1e-4
        close(vct.level_table(n, args.P_mean, args.P_std)[0], rounded, rtol=1e-5, atol=0)
        i = tensor(f'{name}:index')
        return rounded[i + 1], rounded[i], (rounded[-1], rounded[-2])
    t = vct.upper_level(tensor(f'{name}:randn_t'), args.P_mean, args.P_std, args.kernel)
    lower = lambda t: vct.lower_level(t, vct.stage_at(step, 400_000, args.stages), args.q, args.k, args.b)
    return t, lower(t), (80.0, lower(torch.tensor(80.0)))


@pytest.mark.parametrize('name', CASES)
def test_losses_are_the_published_ones(name):
    base, kernel, coupling, step = name.rsplit('_', 3)
    args = argparse.Namespace(**PUBLISHED[base] | dict(kernel=kernel, in_channels=3, resolution=8))
    x0, (t, r, last), settings = tensor('x'), levels(args, name, int(step)), vct.loss_settings(args)
    eps, kl = vct.emit(toy_encoder if coupling == 'vae' else None, x0, tensor(f'{name}:eps'))
    x_t, x_r = vct.path(x0, eps, t, kernel), vct.path(x0, eps, r, kernel)
    student, teacher = (vct.f(toy, x, level, m=settings['m'], kernel=kernel) for x, level in ((x_t, t), (x_r, r)))
    distance = vct.pseudo_huber(student - teacher, settings['c'], settings['huber'])
    close(distance.mean(), GOLDEN[f'{name}:consistency_loss'], rtol=2e-5, atol=0)
    total = vct.loss(toy, x_t, t, x_r, r, **settings) + vct.kl_weight(args.beta, *last, args.weighting) * kl
    close(total.mean(), GOLDEN[f'{name}:loss'], rtol=2e-5, atol=0)
    close(kl.mean(), GOLDEN[f'{name}:kl_divergence'] if coupling == 'vae' else 0, atol=0)


@pytest.mark.parametrize('kernel', ['ve', 'li'])
@pytest.mark.parametrize('coupling', ['independent', 'vae'])
def test_sampler_is_the_published_one(kernel, coupling, monkeypatch):
    name, encoder = f'sample_{kernel}_{coupling}', toy_encoder if coupling == 'vae' else None
    monkeypatch.setattr(common, 'randn', lambda shape, seed, i, stream: tensor(f'{name}:{["z", "eps"][i]}').float())
    monkeypatch.setattr(torch.Tensor, 'clamp', lambda x, *_, **__: x)               # theirs clips when it saves
    images = vct.sample(model_of(toy, encoder, kernel=kernel, in_channels=3, resolution=8), 4, nfe=2)
    close(images, GOLDEN[f'{name}:out'])


@pytest.mark.parametrize('base, kernel, coupling, weighting', [
    ('ict', 've', 'vc', 'gap'), ('ecm', 'li', 'vc', 'gap'), ('ecm', 've', 'vc', 'edm'),
    ('ecm', 've', 'independent', 'gap')])
def test_the_points_and_the_kl_weight_of_a_run(base, kernel, coupling, weighting, spy, monkeypatch):
    """Both points on the path of the image to the emitted noise; beta over the last pair of levels, of q, k and b."""
    own = dict(k=4.0, b=2.0, weighting=weighting)
    monkeypatch.setitem(vct.PRESETS, ('shapes', base), vct.PRESETS['shapes', base] | own)
    calls, encodings = spy(vct, 'loss'), spy(vct, 'encode')
    flags = ['--base', base, '--kernel', kernel, '--coupling', coupling, '--s0', 4, '--s1', 16, '--beta', 3, '--q', 3]
    assert VCT.train(*flags, '--batch', 64, '--steps', 5, '--pretrain-steps', 1, '--stages', 4) == 0
    logged = [line for line in lines(VCT.out) if 'loss' in line]
    for done, call in enumerate(calls):
        x0, y, eps = draws(done + 1, 64)
        if coupling == 'vc':
            mu, std = encodings[done + 1].result
            assert torch.equal(encodings[done + 1].x0, x0) and call.x_t.requires_grad and call.x_r.requires_grad
            eps = mu + std * eps
        for x, level in ((call.x_t, call.t), (call.x_r, call.r)):
            torch.testing.assert_close(x, wide(1 - level / 80 * (kernel == 'li')) * x0 + wide(level) * eps)
        assert torch.equal(call.y, y) and call.kernel == kernel
        if base == 'ict':
            gap = 80 - vct.rho_levels([4, 8, 16, 16][done])[-2]
        else:
            gap = 80 / 3 ** (done + 1) if weighting == 'gap' else 1             # sigmoid(-b 80) is 0
        close(logged[done + 1]['loss'], logged[done + 1]['consistency'] + 3 / gap * logged[done + 1]['kl'])
    close(logged[0]['loss'], logged[0]['consistency'] + logged[0]['kl'] / (3 * 8 * 8))          # of the diffusion model
    assert len(calls) == 4 and len(encodings) >= 5 * (coupling == 'vc') and (logged[0]['kl'] > 1) == (coupling == 'vc')


def first_gradients(out):
    """{name: gradient of the first step} as Adam has kept it, after a run of one step."""
    moments = weights(out, 'checkpoint.pt')['optimizer']['state']
    return {name: moments[i]['exp_avg'] / 0.1 for i, (name, _) in enumerate(vct.load(out).named_parameters())}


def test_the_gradient_reaches_the_encoder_and_is_clipped_as_a_whole(monkeypatch):
    for clip in (0, 1.5):
        assert VCT.train('--steps', 1, '--clip', clip, '--out', clip) == 0
    free, clipped = first_gradients('0'), first_gradients('1.5')
    norm = torch.stack([g.norm() for g in free.values()]).norm()
    close([lines(out)[0]['grad_norm'] for out in ('0', '1.5')], norm)
    assert norm > 3 and any(g.abs().max() > 1e-4 for name, g in free.items() if name.startswith('encoder.'))
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, free[name] * 1.5 / norm, rtol=1e-3, atol=1e-7)
    huge = iter([3e38, torch.inf])
    monkeypatch.setattr(torch.optim, 'Adam', lambda params, *rest, adam=torch.optim.Adam, **few: (
        params[0].register_hook(lambda grad: torch.full_like(grad, next(huge))), adam(params, *rest, **few))[1])
    for clip, out in (0, 'huge'), (1.5, 'bad'):
        assert VCT.train('--steps', 1, '--clip', clip, '--out', out) == 0
    assert all(g.isfinite().all() for g in first_gradients('huge').values())
    first, *others = first_gradients('bad').values()
    assert lines('bad')[0]['grad_norm'] == 'inf' and not first.any() and any(g.norm() > 0.5 for g in others)


def test_the_encoder_drops_units_by_a_mask_of_its_own(monkeypatch):
    masks, plain = [], torch.nn.functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        masks.extend([bytes(torch.get_rng_state().numpy())] * training)
        return plain(x, p, training, inplace)
    monkeypatch.setattr(torch.nn.functional, 'dropout', dropout)
    assert VCT.train('--dropout', 0.5, '--microbatch', 4) == 0
    net = vct.load(VCT.out)
    n, both = (sum(hasattr(m, 'dropout') for m in part.modules()) for part in (net.encoder, net))
    period = 2 * both - n                                       # of a part: encoder, student, teacher
    assert masks[n:both] == masks[both:period] and masks[0] != masks[n]
    assert len(masks) == 4 * 2 * period and len(set(masks[::period])) == 8      # anew in each part
    masks.clear()
    vct.sample(net, 4, nfe=2)
    assert not masks


@pytest.mark.parametrize('base', ['ict', 'ecm'])
def test_analysis_prints_means_and_variances_over_the_noise(base, capsys):
    flags = ['--base', base, '--resolution', 4, '--mults', 1]
    assert VCT.train(*flags, '--s1', 20, '--stages', 3, '--steps', 2, '--lr', 0.01, '--ema', 0) == 0
    table, (title, head, *_) = analysed(VCT, capsys)
    assert title == 'mean of the loss' and head.split() == ['sigma', 'emitted', 'independent'] and len(table) == 18
    table = np.hstack([table[:9], table[9:, 1:]])                               # and the variances
    assert (np.diff(table[:, 0]) > 0).all() and table[-1, 0] == 80
    model, data, index = vct.load(VCT.out), all_shapes(200, 4), common.batch_indices(200, 64, 0, 0)
    x0, y, args = common.normalise(data.images[index]), data.labels[index], argparse.Namespace(**model.config)
    net, encoder = common.network(model, 'fp32'), common.network(model.encoder, 'fp32')
    mu, std = vct.encode(encoder, x0, y)
    sigmas = vct.rho_levels(20 if base == 'ict' else 9)
    r_max = sigmas[-2] if base == 'ict' else vct.lower_level(torch.tensor(80.0), 2).item()
    r_min = sigmas[0] if base == 'ict' else vct.lower_level(torch.tensor(sigmas[1]), 2).item()
    normal = [common.randn(x0.shape, 0, i, 'analyse') for i in range(8)]
    for row, *levels in (table[-1], 80.0, r_max), (table[0], sigmas[1], r_min):
        t, r = (torch.full((64,), level) for level in levels)
        for column, noises in ((1, [mu + std * n for n in normal]), (2, normal)):
            points = [[vct.path(x0, eps, level, args.kernel) for level in (t, r)] for eps in noises]
            losses = torch.stack([vct.loss(net, x_t, t, x_r, r, y, **vct.loss_settings(args)) for x_t, x_r in points])
            close(row[[column, column + 2]], (losses.mean().item(), losses.var(0).mean().item()), rtol=3e-3, atol=1e-12)


def test_wrong_flags_of_vct(refused):
    for flags in '--s1 10 --s0 20', '--q 1e300 --base ecm', '--kernel some', '--clip -1':
        refused(vct, f'{flags} --out x', flags.split()[0])
    assert VCT.train('--coupling', 'independent', '--steps', 1) == 0
    refused(vct, f'--analyse {VCT.out}', 'no encoder')


def idx(array):
    shape = b''.join(n.to_bytes(4, 'big') for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


IMAGES, LABELS = idx(np.arange(30)[:, None, None] * np.ones((1, 28, 28))), idx(np.arange(30) % 10)  # grey level i
PACKED = [gzip.compress(data) for data in (IMAGES, LABELS)]


def fashion(folder, images=PACKED[0], labels=PACKED[1]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in [('images-idx3', images), ('labels-idx1', labels)]:
        (folder / f'train-{name}-ubyte.gz').write_bytes(data)


def test_fmnist_is_found_or_downloaded_and_checked(tmp_path, monkeypatch):
    served = tmp_path / 'served'
    monkeypatch.setattr(common, 'FMNIST_URL', served.as_uri())
    fashion(served)
    with pytest.raises(common.UserError, match='train-images-idx3-ubyte.gz has md5'):
        common.fmnist(tmp_path / 'loaded')
    assert not (tmp_path / 'loaded').exists()
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(served.iterdir())}
    monkeypatch.setattr(common, 'FMNIST_MD5', md5)
    fashion(tmp_path / 'there/fashion-mnist')
    for root in (tmp_path / 'there', tmp_path / 'loaded'):
        data = common.fmnist(root)
        assert data.images.shape == (30, 1, 28, 28) and data.images.dtype == torch.uint8 and data.classes == 10
        assert data.images[7].unique().tolist() == [7] and data.labels.tolist() == [i % 10 for i in range(30)]
    assert sorted(path.name for path in (tmp_path / 'loaded/fashion-mnist').iterdir()) == sorted(md5)


@pytest.mark.parametrize('images, labels', [
    *([gzip.compress(part) for part in pair] for pair in [
        (IMAGES[:-1], LABELS), (IMAGES, b''), (IMAGES, LABELS[:-1]), (IMAGES, idx(np.full(30, 10))),
        (b'\0\0\r' + IMAGES[3:], LABELS), (idx(np.zeros((0, 28, 28))), idx(np.zeros(0)))]),
    *((packed, PACKED[1]) for packed in (PACKED[0][:-20], b'no gzip', PACKED[0][:40] + bytes(40)))])
def test_fmnist_that_is_damaged(images, labels, tmp_path):
    fashion(tmp_path / 'fashion-mnist', images, labels)
    with pytest.raises(common.UserError, match='cannot be read'):
        common.fmnist(tmp_path)


def test_grey_pictures_train_sample_and_score(tmp_path, capsys):
    fashion(tmp_path / 'data/fashion-mnist')
    flags = ['--dataset', 'fmnist', *TINY_NETWORK, '--pretrain-steps', 0, '--batch', 8, '--steps', 2, '--base', 'ecm']
    flags += ['--resolution', 14, '--cond', '--sample-every', 2, '--fid-num', 10, '--fid-features', 'pixels']
    out = Path('runs/vct-fmnist')
    assert VCT.run(*flags) == VCT.run('--evaluate', out) == 0
    assert vct.sample(vct.load(out), 3, nfe=2).shape == (3, 1, 14, 14)
    assert 'pixel-FD (10 images against the 30 training images), 1 step: ' in capsys.readouterr().out
    assert Image.open(out / 'samples/0000002.png').size == (8 * 58 + 2, 8 * 58 + 2)
