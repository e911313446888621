"""Consistency training with generator-induced coupling (GC). Thibaut Issenhuth, Sangchul Lee, Ludovic Dos Santos,
Jean-Yves Franceschi, Chansoo Kim, Alain Rakotomamonjy, 2024, https://arxiv.org/abs/2406.09570

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the
probability flow ODE through x_t ends. Improved consistency training (iCT, Song & Dhariwal 2023, arXiv 2310.14189)
trains it from scratch by asking that neighbours on one path agree, at levels r = sigma_i and t = sigma_(i+1):

    x_t = x0 + t z,   x_r = x0 + r z,   z ~ N(0, I)
    loss = d( f(x_t, t), stopgrad f(x_r, r) ) / (t - r),   and f(x, sigma_min) = x

The image x0 and the noise z are drawn independently (`--coupling ic`), so that the paths of different pairs cross and
the direction z is only on average that of the ODE. Here the model itself says which image goes with the noise: with
probability mu a sample's image is replaced by the end of the path that the model sees from x_r,

    x_hat = stopgrad f_EMA(x0 + r z, r),           x_t = x_hat + t z,   x_r = x_hat + r z

and the loss is the same. By the paper such pairs lie nearer to each other, and their direction nearer to the ODE's,
which `--analyse` measures. `--coupling ot` pairs images and noise within each batch at the least total distance instead
(Pooladian et al. 2023, arXiv 2304.14772).

    python gc_ct.py                                               # ten shapes, five to fifteen minutes on a CPU
    python gc_ct.py --dataset cifar10 --gpus 8                    # the paper's setting
    python gc_ct.py --dataset cifar10 --schedule ect --gpus 8     # the same coupling on Easy Consistency Tuning
    python gc_ct.py --sample runs/gc_ct-shapes --nfe 2            # a grid of images; --evaluate: FID
    python gc_ct.py --analyse runs/gc_ct-shapes                   # transport cost and regulariser of the couplings

Where the paper leaves a choice, and where we deviate from it or from the published code:
 1. `--mu` is the share of generated endpoints (published code: of the others), made for those samples alone.
 2. `--coupling ot` assigns within the global minibatch whatever the labels: a class's noise is not quite N(0, I).
 3. Dropout is 0 with generated endpoints and 0.3 without, where a preset leaves it open (CIFAR-10 with ect: 0.2).
 4. With `--schedule ect` the optimiser is ECT's RAdam, the boundary m = 0 in training (a diffusion model is a valid
    start), and sigma_min in sampling. The moving average is GC's: every 5 steps, its decay rising to `--ema`; 0.9999
    is reached after a million steps only.
 5. `--cond` (labels for network and endpoints) is ours; the paper is unconditional.
 6. The regulariser in `--analyse` has the ODE's exact direction over the training set (50,000 images at most).
 7. `--pretrain-steps` trains the diffusion model that tuning starts from, with the mean over pixels for a loss.
 8. Sampling adds t z, not sqrt(t² - sigma_min²) z; more than two levels are spaced by rho 7. No flips in training.
"""
import copy
import functools
import importlib.util
import math
import sys
from pathlib import Path

import torch

import common
import fid
from unet import URLS, initial_network, make_network

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

ICT = dict(                     # iCT's settings, which GC keeps
    arch='songunet', attn_resolutions=[], dropout_res=None, checkpoint=None, lr_decay=None, flip=False,
    dropout=None, dropout_ic=0.3,   # None: 0 with generated endpoints, dropout_ic without
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and deviation, at the levels of the discretisation
    s0=10, s1=1280,             # there are s0 pairs of levels at first and s1 in the end
    c=0.00054,                  # distance sqrt(|u|² + c² D) - c sqrt(D), for images of D numbers
    schedule='ict', coupling='gc', mu=0.5, endpoint='ema',
    t_mid=0.821,                # noise level of the second step when sampling with two
    optimizer='Lion', betas=(0.9, 0.99), lr=1e-4, ema=0.9999, ema_every=5, pretrain_steps=0, cond=False, nfe=[1],
    save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
ECT = dict(                     # Easy Consistency Tuning, from EDM's DDPM++
    schedule='ect', q=2.0, k=8.0, b=1.0, stages=8, c=0.0, mu=0.3, optimizer='RAdam', betas=(0.9, 0.999))
PRESETS = {
    'shapes': ICT | dict(       # built in; ours, sized for two CPU cores
        resolution=16, width=32, mults=[1, 1, 2], blocks=1, dropout=0.0, cond=True,
        batch=32, steps=1600, s1=80, lr=1e-4, lr_decay=100, mu=0.3, ema=0.998, ema_every=1,
        save_every=500, sample_every=200, eval_every=1600, fid_features='pixels', fid_num=2000),
    'cifar10': ICT | dict(resolution=32, width=128, mults=[1, 2, 2], blocks=3, batch=512, steps=100_000),
    'imagenet32': ICT | dict(
        resolution=32, width=128, mults=[1, 1, 2], blocks=[3, 5, 7], attn_resolutions=[16], dropout_ic=[0, 0.2, 0.2],
        batch=512, steps=150_000, lr=8e-5),
    'celeba64': ICT | dict(
        resolution=64, width=128, mults=[1, 2, 2, 2], blocks=[3, 3, 4, 5], dropout_ic=[0, 0, 0.2, 0.2],
        batch=128, steps=150_000, lr=8e-5)}
PRESETS['fmnist'] = PRESETS['cifar10'] | dict(resolution=28, width=64, batch=128)                               # ours
PRESETS['folder'] = PRESETS['cifar10'] | dict(resolution=None)                  # your pictures
PRESETS |= {(name, 'ect'): PRESETS[name] | ECT for name in ('imagenet32', 'celeba64', 'fmnist')}
PRESETS['shapes', 'ect'] = PRESETS['shapes'] | ECT | dict(optimizer='Adam', pretrain_steps=600, stages=3, lr=1e-3)
PRESETS['cifar10', 'ect'] = PRESETS['cifar10'] | ECT | dict(
    mults=[2, 2, 2], blocks=4, attn_resolutions=[16], dropout=0.2, checkpoint=URLS['cifar10'], batch=128, steps=400_000)
PRESETS['folder', 'ect'] = PRESETS['cifar10', 'ect'] | dict(resolution=None, checkpoint=None)


# 2. Noise levels: the pair t > r of a sample

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


def num_levels(step, steps, s0=10, s1=1280):
    """N(k): how many noise levels there are at a step; their number of gaps doubles from s0 to s1 (iCT Sec. 3.4)."""
    doubling = max(1, math.floor(steps / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (step // doubling), s1) + 1


def rho_levels(n, rho=7):
    """n + 1 levels from sigma_min to sigma_max, evenly spaced in sigma^(1/rho) (EDM Eq. 5)."""
    low, high = SIGMA_MIN ** (1 / rho), SIGMA_MAX ** (1 / rho)
    return [(low + i / n * (high - low)) ** rho for i in range(n + 1)]


@functools.lru_cache(maxsize=2)             # N changes a few times in a run: no copy to the device in any other step
def level_table(n, P_mean, P_std, device='cpu'):
    """n levels, ascending, and the probability of each pair of neighbours (n - 1,), on the device (iCT Sec. 3.5)."""
    sigmas = torch.tensor(rho_levels(n - 1))
    cdf = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))      # of ln sigma ~ N(P_mean, P_std²)
    return sigmas.to(device), (cdf.diff() / (cdf[-1] - cdf[0])).to(device)


def level_pair(u, sigmas, probabilities):
    """Neighbours t = sigma_(i+1), r = sigma_i for uniform u (B,), by the inverse of their distribution. -> (B,) each"""
    i = torch.searchsorted(probabilities.cumsum(0).float(), u, right=True).clamp(max=len(sigmas) - 2)
    return sigmas[i + 1], sigmas[i]


def upper_level(normal, P_mean, P_std):
    """ECT's t of a standard normal draw: ln t ~ N(P_mean, P_std²). (B,) -> (B,)"""
    return (P_mean + P_std * normal).exp()


def lower_level(t, stage, q=2.0, k=8.0, b=1.0):
    """ECT's r < t of a pair: t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


# 3. Model

def f(net, x, t, y=None, m=0.0):
    """The consistency function: c_skip x + c_out F(c_in x, ln(t)/4, y) (EDM Eq. 7). Boundary condition: x at t = m.

    net is any function (x_in, c_noise, y) -> like x_in; x (B, C, H, W), t (B,), y (B,) labels or None -> (B, C, H, W).
    """
    s, t4 = SIGMA_DATA, t[:, None, None, None]
    c_skip = s ** 2 / ((t4 - m) ** 2 + s ** 2)
    c_out = s * (t4 - m) / (s ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (s ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.clamp(min=1e-10).log() / 4, y)          # at t = 0, c_out is 0: f is x


# 4. Coupling: which image goes with which noise

@torch.no_grad()
def generator_coupling(net, x0, z, r, y, chosen, m=0.0):
    """x_hat = stopgrad f(x0 + r z, r) where `chosen`, else x0 (the paper's Alg. 1). At r = m = 0 both are the same.

    net: the endpoint network; x0, z (B, C, H, W); r (B,), the lower level of each pair; chosen (B,) bool, on the host:
    no wait for the device. -> (B, C, H, W)
    """
    i = chosen.nonzero()[:, 0]
    if not len(i):
        return x0
    n = len(i)
    if x0.is_cuda:          # cuDNN tunes itself anew for each batch size: round up to 16s, repeating an endpoint
        i = torch.cat([i, i[:1].expand(-n % 16)])
    i = i.to(x0.device, non_blocking=True)
    x_hat = f(net, x0[i] + r[i, None, None, None] * z[i], r[i], None if y is None else y[i], m)
    return x0.index_copy(0, i[:n], x_hat[:n])               # the repeated ones may differ: dropout, order of writing


# 5. Loss: the distance of f(x_t, t) from the target stop-gradient f(x_r, r), weighted

def loss(net, x0, z, t, r, y=None, teacher=None, mask=0, c=0.0, m=0.0):
    """Consistency loss of each sample, at x0 + t z and x0 + r z (iCT Eq. 7; with ECT r may be 0 = m). -> (B,)

    `mask` seeds the dropout: both networks drop the same units, so that their difference is not that of two masks.
    """
    r4, t4 = r[:, None, None, None], t[:, None, None, None]
    torch.manual_seed(mask)
    student = f(net, x0 + t4 * z, t, y, m)
    with torch.no_grad():                                                       # stop-gradient
        torch.manual_seed(mask)
        target = f(teacher or net, x0 + r4 * z, r, y, m)
    norm = torch.linalg.vector_norm((student - target).flatten(1), dim=1)           # |u|; its gradient at 0 is 0
    c = c * math.sqrt(x0[0].numel())
    distance = (norm.square() + c ** 2).sqrt() - c if c else norm                   # pseudo-Huber (iCT Sec. 3.3)
    return distance * (1 / (t - r))


def denoising_loss(net, x0, z, t, y=None, mask=0):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), as a mean over the pixels. -> (B,)"""
    torch.manual_seed(mask)
    weight = (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2                         # lambda(t) of EDM Table 1
    return weight * (f(net, x0 + t[:, None, None, None] * z, t, y) - x0).square().flatten(1).mean(1)


# 6. Sampling

@torch.inference_mode()
def sample(model: torch.nn.Module, n: int, nfe: int = 1, labels: list[int] | None = None, seed: int = 0,
           first: int = 0) -> torch.Tensor:
    """n images in [-1, 1], (n, C, H, W), of `nfe` network evaluations; labels: classes, in turn from number `first` on.

    One step: f(sigma_max z, sigma_max). Each further one adds fresh noise of a lower level and maps back (CM Alg. 1).
    """
    net, images = common.network(model, model.config['precision']), []
    levels = rho_levels(nfe)[:0:-1]                                             # nfe of them, from sigma_max downwards
    if nfe == 2:
        levels[1] = model.config['t_mid']
    for noise, y in common.sampling_noise(model, n, nfe, labels, seed, first):
        x0_hat = 0.0
        for level, z in zip(levels, noise):
            x0_hat = f(net, x0_hat + level * z, torch.full_like(z[:, 0, 0, 0], level), y, SIGMA_MIN)
        images.append(x0_hat.clamp(-1, 1))
    return torch.cat(images)


def load(path: str | Path, device: str | torch.device = 'cpu') -> torch.nn.Module:
    """The EMA network of a run (its folder, checkpoint.pt or final.pt), for `sample`; its settings are in `.config`."""
    return common.load_network(path, make_network, device)


# 7. Training

def ema_warmup(step, limit):
    """Decay of the moving average after training step 0, 1, ...: it copies at first, then averages ever longer."""
    return min(max(1 - (1 + step) ** (-2 / 3), 0.0), limit)


class Lion(torch.optim.Optimizer):
    """Lion without weight decay (Chen et al. 2023, arXiv 2302.06675, Alg. 2): steps of lr along the momentum's sign."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), foreach=True):
        super().__init__(params, dict(lr=lr, betas=betas))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if p not in self.state:
                    self.state[p]['exp_avg'] = torch.zeros_like(p)
            momenta = [self.state[p]['exp_avg'] for p in params]
            updates = torch._foreach_lerp(momenta, grads, 1 - group['betas'][0])        # few calls for all parameters
            torch._foreach_sign_(updates)
            torch._foreach_add_(params, updates, alpha=-group['lr'])
            torch._foreach_lerp_(momenta, grads, 1 - group['betas'][1])


def train(args):
    """One run, from data to final.pt."""
    device = common.start(args)
    data = common.load_data(args, device)                               # sets resolution, in_channels, label_dim
    judge = fid.prepare(args, device, data)                             # now: what is missing is to be missed now

    net = initial_network(args, device, tunes=args.schedule == 'ect')
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = (Lion if args.optimizer == 'Lion' else getattr(torch.optim, args.optimizer))(
        net.parameters(), args.lr, args.betas, foreach=True)                    # foreach: few calls for all parameters
    start = common.open_run(args, net=net, ema=ema, optimizer=optimizer)
    wrapped, clock, log = common.distributed(net, args), common.Clock(args, device), common.Log(args, start, device)
    student, teacher = clock.watch(wrapped, 'student'), clock.watch(net, 'teacher')
    endpoint = clock.watch(ema if args.endpoint == 'ema' else net, 'endpoint')
    draw = functools.partial(sample, ema, labels=args.labels)
    evaluate, mine = functools.partial(fid.evaluate, judge, args, draw), common.my_part(args.batch)
    m = SIGMA_MIN if args.schedule == 'ict' else 0.0                            # boundary condition f(x, m) = x

    for step, _, x_all, y_all in clock.steps(common.batches(data, args, start, device), net):
        if step == args.pretrain_steps > 0:                                     # tuning starts as from a checkpoint
            net.load_state_dict(ema.state_dict())
            optimizer.state.clear()

        # Draws: t, r and noise, of the global batch, so that any number of processes trains on the same ones.
        normal = lambda stream, *shape: common.randn((args.batch, *shape), args.seed, step, stream, device=device)
        z_all = normal('noise', *x_all.shape[1:])
        pretraining = step < args.pretrain_steps
        done, total_steps = step - args.pretrain_steps * (not pretraining), args.steps - args.pretrain_steps
        if pretraining:
            t = r = upper_level(normal('level'), -1.2, 1.2)[mine]               # EDM Table 1 for the diffusion model
        elif args.schedule == 'ict':
            table = level_table(num_levels(done, total_steps, args.s0, args.s1), args.P_mean, args.P_std, device)
            t, r = level_pair(common.rand((args.batch,), args.seed, step, 'level', device=device)[mine], *table)
        else:
            t = upper_level(normal('level'), args.P_mean, args.P_std)[mine]
            stage = min(done * args.stages // max(total_steps, 1), args.stages - 1)
            r = lower_level(t, stage, args.q, args.k, args.b)
        clock('data')

        # Coupling.
        if args.coupling == 'ot' and not pretraining:
            order = common.optimal_transport(x_all, z_all)
            x_all, y_all = x_all[order], y_all[order]                           # labels travel with their images
        mu = args.mu if args.coupling == 'gc' and not pretraining else 0.0
        chosen = (common.rand((args.batch,), args.seed, step, 'mix') < mu)[mine]
        x0, z, y = x_all[mine], z_all[mine], y_all[mine]
        clock('coupling')

        # Loss and gradient.
        total = torch.zeros((), device=device)
        for part, mask in common.microbatches(wrapped, args, step):
            torch.manual_seed(mask)                                             # the dropout of an online endpoint
            x_hat = generator_coupling(endpoint, x0[part], z[part], r[part], y[part], chosen[part], m)
            if pretraining:
                value = denoising_loss(student, x0[part], z[part], t[part], y[part], mask)
            else:
                value = loss(student, x_hat, z[part], t[part], r[part], y[part], teacher, mask, args.c, m)
            clock('loss')
            (value.sum() * common.LOSS_SCALE.get(args.precision, 1.0) / len(x0)).backward()
            total += value.detach().sum() / len(x0)
            clock('backward')

        # Update.
        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        common.learning_rate(optimizer, done, args.lr, args.lr_decay)
        optimizer.step()
        optimizer.zero_grad()
        clock('optimiser')
        if done % args.ema_every == 0:
            common.update_ema(ema, net, ema_warmup(done, args.ema))
        clock('EMA')
        log.step(step + 1, loss=total, grad_norm=grad_norm)
        if common.keep(args, step + 1, log, evaluate, draw, net=net, ema=ema, optimizer=optimizer):
            return
    common.save_final(args, ema)


# 8. The paper's diagnostics

@torch.inference_mode()
def diagnostics(net, x0, z, y, images, labels, sigma, m=SIGMA_MIN, order=None):
    """Of each coupling at the level sigma, means over the batch and an image's numbers. -> {name: (cost, proxy)}

    cost: |x - z|² of the pairs (x, z), the transport cost. proxy: |z - v(x_t)|² at x_t = x + sigma z, how far the
    direction of training is from the ODE's, v = (x_t - E[x0 | x_t]) / sigma: the gap between consistency training and
    distillation grows with it. The posterior is over `images` (N, C, H, W). order: of `optimal_transport`.
    """
    t, everyone = torch.full_like(x0[:, 0, 0, 0], sigma), torch.ones(len(x0), dtype=torch.bool)
    pairs = {'IC': (x0, y), 'GC': (generator_coupling(net, x0, z, t, y, everyone, m), y)}
    if order is not None:
        pairs['OT'] = x0[order], y[order]
    flat, results = images.flatten(1), {}
    for name, (x, y) in pairs.items():
        x_t = x + sigma * z
        with common.true_float32():
            logits = (x_t.flatten(1) @ flat.T - flat.square().sum(1) / 2) / sigma ** 2      # -|x_t - x0|² / (2 sigma²)
            mean = logits.masked_fill(y[:, None] != labels, -torch.inf).softmax(1) @ flat   # E[x0 | x_t]
        v = (x_t - mean.view_as(x)) / sigma
        results[name] = (x - z).square().mean().item(), (z - v).square().mean().item()
    return results


def analyse(args, model, device):
    """Prints both diagnostics by noise level, of 512 images, and draws them, in `analyse.png`. OT needs SciPy."""
    data, net = common.load_data(args, device), common.network(model, args.precision)
    images, labels = data.at(torch.arange(min(len(data.images), 50_000)), device)
    m, means = SIGMA_MIN if args.schedule == 'ict' else 0.0, {}
    for sigma in common.progress(rho_levels(12)[1:], 'noise levels'):
        found = []
        for j, index in enumerate(common.batch_indices(len(data.images), 512, 0, args.seed).split(64)):
            x0, y = data.at(index, device)
            z = common.randn(x0.shape, args.seed, j, 'analyse', device=device)
            order = common.optimal_transport(x0, z) if importlib.util.find_spec('scipy') else None
            found.append(diagnostics(net, x0, z, y, images, labels, sigma, m, order))
        means[sigma] = {name: torch.tensor([one[name] for one in found]).mean(0).tolist() for name in found[0]}
    panels = {}
    for i, title in enumerate(('transport cost: mean square of x - z', 'regulariser: mean square of z - v')):
        common.say(f'{title}\n   sigma ' + ''.join(f'{name:>10}' for name in found[0]))
        for sigma, row in means.items():
            common.say(f'{sigma:8.4g} ' + ''.join(f'{value[i]:10.4f}' for value in row.values()))
        panels[title] = {name: [(sigma, row[name][i]) for sigma, row in means.items()] for name in found[0]}
    common.save_picture(args, 'analyse.png', lambda path: common.save_plot(panels, path, 'noise level sigma'))


# 9. Command line

def add_flags(add, number):
    """The flags that are GC's own."""
    add('--coupling', choices=['ic', 'ot', 'gc'], help='of image and noise: independent, transport, generator-induced')
    add('--mu', type=number(float, 0, 1), metavar='P', help='share of generated endpoints')
    add('--endpoint', choices=['ema', 'online'], help='the network that generates them; online: with dropout')
    add('--schedule', choices=['ict', 'ect'], help='from scratch on ever more levels, or tuning with ever smaller gaps')
    add('--s0', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels at first')
    add('--s1', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels in the end')
    add('--q', type=number(float, 1.001), metavar='X', help='ect: what the gap is divided by from stage to stage')
    add('--stages', type=number(int, 1, 64), metavar='N', help='ect: stages of the shrinking, over the run')
    add('--ema-every', type=number(int, 1), metavar='N', help='steps between updates of the moving average')
    add('--analyse', metavar='CKPT', help='print and draw transport cost and regulariser by coupling and noise level')


def main(argv):
    """`python gc_ct.py`: trains, or with --sample / --evaluate / --analyse uses what was trained."""
    args = common.parse_args('gc_ct', __doc__, PRESETS, add_flags, '--schedule ect --mu 0.3', argv, switch='schedule')
    if args.dropout is None:
        args.dropout = 0.0 if args.coupling == 'gc' else args.dropout_ic
    if not args.use:
        return train(args)
    device = common.start(args)
    model = load(args.use, device)
    model.config['precision'] = args.precision
    draw = functools.partial(sample, model, labels=args.labels)
    if args.analyse:
        return analyse(args, model, device)
    if args.sample:
        return common.save_samples(args, draw)
    fid.evaluate(fid.prepare(args, device), args, draw)


if __name__ == '__main__':
    sys.exit(common.run(main))
