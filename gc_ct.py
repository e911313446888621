"""Consistency training with generator-induced coupling (GC). Thibaut Issenhuth, Sangchul Lee, Ludovic Dos Santos,
Jean-Yves Franceschi, Chansoo Kim, Alain Rakotomamonjy, 2024, https://arxiv.org/abs/2406.09570

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the
probability flow ODE through x_t ends. Improved consistency training (iCT, Song & Dhariwal 2023, arXiv 2310.14189)
trains it from scratch by asking that neighbours on one path agree, at levels r = sigma_i and t = sigma_(i+1):

    x_t = x0 + t eps,   x_r = x0 + r eps,   eps ~ N(0, I)
    loss = d( f(x_t, t), stopgrad f(x_r, r) ) / (t - r),   and f(x, sigma_min) = x

The image x0 and the noise eps are drawn independently (`--coupling ic`), so that the paths of different pairs cross and
the direction eps is only on average that of the ODE. Here the model itself says which image goes with the noise: with
probability mu a sample's image is replaced by the end of the path that the model sees from x_r,

    x_hat = stopgrad f_EMA(x0 + r eps, r),         x_t = x_hat + t eps,   x_r = x_hat + r eps

and the loss is the same. By the paper such pairs lie nearer to each other, and their direction nearer to the ODE's, as
`--analyse` measures.

    python gc_ct.py                                               # ten shapes, some five minutes on two CPU cores
    python gc_ct.py --dataset cifar10 --gpus 8                    # the paper's setting
    python gc_ct.py --dataset cifar10 --schedule ect --gpus 8     # the same coupling on Easy Consistency Tuning
    python gc_ct.py --sample runs/gc_ct-shapes --nfe 2            # or --evaluate (FID), --analyse (the couplings)

Where the paper leaves a choice, and where we deviate from it or its published code (`[n]` in the code):
[1] `--mu` is the share of generated endpoints (published code: of the others), made for those samples alone.
[2] `--coupling ot` (Pooladian et al. 2023, arXiv 2304.14772) pairs images and noise of the global minibatch at the
    least total distance, whatever the labels: a class's noise is not quite N(0, I).
[3] Dropout is 0 with generated endpoints, the baselines' without; on CIFAR-10 ECT's with both. `--cond` is ours.
[4] `--schedule ect` is Easy Consistency Tuning (Geng et al. 2024, arXiv 2406.14548), from a diffusion model, which
    `--pretrain-steps` trains (the loss a mean over pixels): RAdam; the boundary m = 0, but sigma_min in sampling.
[5] The average is updated every 5 steps, its decay rising to `--ema`: 0.9999 is reached after a million steps only.
    On ImageNet-32 it runs from the first step (published code: from step 10,000).
[6] The regulariser in `--analyse` has the ODE's exact direction over the training set (50,000 of it at most).
[7] Sampling adds t z, not sqrt(t² - sigma_min²) z; more than two levels are spaced by rho 7. FID is of the last
    average, clipped and rounded; the published: best of the run, samples stretched batch by batch to their own range.
[8] Data: the whole of CelebA's folder (published: its train split); ImageNet-32 by Lanczos, not bilinear.
"""
import copy
import functools
import importlib.util
import math
import sys

import torch

import common
import fid
from unet import URLS, initial_network, make_network

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

ICT = dict(                     # iCT's settings, which GC keeps
    arch='songunet', attn_resolutions=[], cond=False, flip=False, checkpoint=None, pretrain_steps=0,               # [3]
    dropout=None, dropout_ic=0.3, dropout_res=None,         # None: 0 with generated endpoints, dropout_ic without
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and standard deviation, at the discrete levels
    s0=10, s1=1280,             # there are s0 pairs of levels at first and s1 in the end
    c=0.00054,                  # distance sqrt(|u|² + c² D) - c sqrt(D), for images of D numbers
    schedule='ict', coupling='gc', mu=0.5, endpoint='ema',
    t_mid=0.821, nfe=[1],       # noise level of the second step when sampling with two
    optimizer='Lion', betas=[0.9, 0.99], lr=1e-4, lr_decay=None, ema=0.9999, ema_every=5, batch=512, steps=100_000,
    save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
ECT = dict(                     # Easy Consistency Tuning, from EDM's DDPM++                                        [4]
    schedule='ect', q=2.0, k=8.0, b=1.0, stages=8, c=0.0, mu=0.3, optimizer='RAdam', betas=[0.9, 0.999])
PRESETS = {
    'shapes': ICT | dict(       # built in; ours, sized for two CPU cores
        resolution=16, width=32, mults=[1, 1, 2], blocks=1, dropout=0.0, cond=True,
        batch=32, steps=2500, s1=40, mu=0.3, optimizer='Adam', betas=[0.9, 0.999], lr=1e-3, lr_decay=100, ema=0.998,
        ema_every=1, save_every=500, sample_every=200, eval_every=2500, fid_features='pixels', fid_num=2000),
    'cifar10': ICT | dict(resolution=32, width=128, mults=[1, 2, 2], blocks=3),
    'imagenet32': ICT | dict(   #                                                                                   [8]
        resolution=32, width=128, mults=[1, 1, 2], blocks=[3, 5, 7], attn_resolutions=[16], dropout_ic=[0, 0.2, 0.2],
        steps=150_000, lr=8e-5),
    'celeba64': ICT | dict(     #                                                                                   [8]
        resolution=64, width=128, mults=[1, 2, 2, 2], blocks=[3, 3, 4, 5], dropout_ic=[0, 0, 0.2, 0.2],
        batch=128, steps=150_000, lr=8e-5)}
PRESETS['fmnist'] = PRESETS['cifar10'] | dict(resolution=28, width=64, batch=128)                               # ours
PRESETS['folder'] = PRESETS['cifar10'] | dict(resolution=None)                                          # your pictures
PRESETS |= {(name, 'ect'): PRESETS[name] | ECT for name in ('imagenet32', 'celeba64', 'fmnist')}
PRESETS['shapes', 'ect'] = PRESETS['shapes'] | ECT | dict(optimizer='Adam', pretrain_steps=300, stages=3)
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
    """n levels, ascending, and the cumulative probability of their pairs (n - 1,), on the device."""
    sigmas = torch.tensor(rho_levels(n - 1))
    return sigmas.to(device), pair_probabilities(sigmas, P_mean, P_std).cumsum(0).float().to(device)


def pair_probabilities(sigmas, P_mean, P_std):
    """How often each pair of neighbours is trained on: ln sigma ~ N(P_mean, P_std²) (iCT Sec. 3.5). (n,) -> (n - 1,)"""
    cdf = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))
    return cdf.diff() / (cdf[-1] - cdf[0])


def level_pair(u, sigmas, cumulative):
    """Neighbours t = sigma_(i+1), r = sigma_i for uniform u (B,), by the inverse of their distribution. -> (B,) each"""
    i = torch.searchsorted(cumulative, u, right=True).clamp(max=len(sigmas) - 2)
    return sigmas[i + 1], sigmas[i]


def upper_level(normal, P_mean, P_std):
    """ECT's t of a standard normal draw: ln t ~ N(P_mean, P_std²). (B,) -> (B,)"""
    return (P_mean + P_std * normal).exp()


def lower_level(t, stage, q=2.0, k=8.0, b=1.0):
    """ECT's r < t of a pair: t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


def stage_at(step, steps, stages):
    """The stage that `lower_level` takes at a step of tuning: 0 ... stages - 1."""
    return min(step * stages // max(steps, 1), stages - 1)


def level_pairs(args, step, device):
    """t and r of the global batch of a step. -> (B,) each"""
    done, steps = step - args.pretrain_steps, args.steps - args.pretrain_steps
    if args.schedule == 'ict' and done >= 0:
        table = level_table(num_levels(done, steps, args.s0, args.s1), args.P_mean, args.P_std, device)
        return level_pair(common.rand((args.batch,), args.seed, step, 'level', device=device), *table)
    normal = common.randn((args.batch,), args.seed, step, 'level', device=device)
    if done < 0:
        t = upper_level(normal, -1.2, 1.2)                 # EDM Tab. 1 for the diffusion model, which has no pairs
        return t, t
    t = upper_level(normal, args.P_mean, args.P_std)
    return t, lower_level(t, stage_at(done, steps, args.stages), args.q, args.k, args.b)


# 3. Model: the consistency function f

def f(net, x, t, y=None, m=0.0):
    """c_skip x + c_out F(c_in x, ln(t)/4, y) (EDM Eq. 7), which is x at t = m. x (B, C, H, W), t, y (B,) -> like x"""
    t4 = t[:, None, None, None]                                         # to go with images
    c_skip = SIGMA_DATA ** 2 / ((t4 - m) ** 2 + SIGMA_DATA ** 2)
    c_out = SIGMA_DATA * (t4 - m) / (SIGMA_DATA ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (SIGMA_DATA ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.clamp(min=1e-10).log() / 4, y)          # at t = 0, c_out is 0: f is x


# 4. Coupling: which image goes with which noise

@torch.no_grad()
def generator_coupling(net, x0, eps, r, y, chosen, m=0.0):
    """x_hat = stopgrad f(x0 + r eps, r) where `chosen`, else x0 (the paper's Alg. 1). At r = m = 0 both are the same.

    x0, eps (B, C, H, W), r, y (B,); chosen (B,) bool, on the host: no wait for the device. -> like x0
    """
    i = chosen.nonzero()[:, 0]                                                                                  # [1]
    n = len(i)
    if n == 0:
        return x0
    if x0.is_cuda:          # each batch size is tuned or compiled anew: few of them, by repeating an endpoint
        i = torch.cat([i, i[:1].expand(-n % -(-len(x0) // 8))])
    i = i.to(x0.device, non_blocking=True)
    x_r = x0[i] + r[i, None, None, None] * eps[i]
    x_hat = f(net, x_r, r[i], None if y is None else y[i], m)
    return x0.index_copy(0, i[:n], x_hat[:n])               # the repeated ones may differ: dropout, order of writing


def optimal_transport(x0, eps):
    """The order (B,) of x0 (B, ...) whose pairs with eps (B, ...) have the least sum of |x0 - sigma_max eps|² [2]."""
    with common.or_refuse('--coupling ot needs SciPy: pip install scipy'):
        from scipy.optimize import linear_sum_assignment
    with common.true_float32():
        gain = eps.flatten(1) @ x0.flatten(1).T         # the squares are the same in any order, whatever eps's scale
    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]).to(x0.device)


# 5. Loss: the distance of f(x_t, t) from the target stop-gradient f(x_r, r), weighted

def edm_weight(t):
    """lambda(t) = (t² + sigma_data²) / (t sigma_data)² (EDM Tab. 1). (B,) -> (B,)"""
    return (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2


def loss(net, x_t, t, x_r, r, y=None, teacher=None, seed=0, c=0.0, m=0.0):
    """Consistency loss of each sample (iCT Eq. 7; with ECT r may be 0 = m). x_t, x_r (B, C, H, W), t, r (B,) -> (B,)"""
    torch.manual_seed(seed)                                             # dropout: the same units in both
    student = f(net, x_t, t, y, m)
    with torch.no_grad():                                               # stop-gradient: a teacher of the same weights
        torch.manual_seed(seed)
        target = f(teacher or net, x_r, r, y, m)
    norm = torch.linalg.vector_norm((student - target).flatten(1), dim=1)           # |u|; its gradient at 0 is 0
    distance = (norm.square() + c ** 2).sqrt() - c if c else norm                   # pseudo-Huber (iCT Sec. 3.3)
    return distance * (1 / (t - r))


def loss_settings(args):
    """c of the distance, in iCT times the root of an image's numbers (its Sec. 3.3), and the boundary m [4]."""
    if args.schedule == 'ict':
        return dict(c=args.c * math.sqrt(args.in_channels * args.resolution ** 2), m=SIGMA_MIN)
    return dict(c=args.c, m=0.0)


def denoising_loss(net, x_t, t, x0, y=None, seed=0):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), as a mean over the pixels [4]. -> (B,)"""
    torch.manual_seed(seed)
    return edm_weight(t) * (f(net, x_t, t, y) - x0).square().flatten(1).mean(1)


# 6. Sampling

@torch.inference_mode()
def sample(model, n, nfe=1, labels=None, seed=0, first=0):
    """n images in [-1, 1], (n, C, H, W), of `nfe` network evaluations; labels: classes, in turn from number `first` on.

    One step: f(sigma_max z, sigma_max). Each further one adds fresh noise of a lower level and maps back (CM Alg. 1).
    """
    net, images = common.network(model, model.config['precision']), []
    levels = rho_levels(nfe)[nfe:0:-1]                                  # nfe of them, from sigma_max downwards     [7]
    if nfe == 2:
        levels[1] = model.config['t_mid']
    for noise, y in common.sampling_noise(model, n, nfe, labels, seed, first):                                  # [7]
        x0_hat = 0.0
        for level, z in zip(levels, noise):
            x0_hat = f(net, x0_hat + level * z, torch.full_like(z[:, 0, 0, 0], level), y, SIGMA_MIN)
        images.append(x0_hat.clamp(-1, 1))
    return torch.cat(images)


load = functools.partial(common.load_network, make_network)


# 7. Training

def ema_decay(args, step):
    """Decay of the moving average after a step, counted from 0: it copies at first, then averages ever longer [5]."""
    done = step if step < args.pretrain_steps else step - args.pretrain_steps
    return min(max(1 - (1 + done) ** (-2 / 3), 0.0), args.ema)


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
    net = initial_network(args, device, tunes=args.schedule == 'ect')
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    sample_fn = functools.partial(sample, ema, labels=args.labels)
    optimizer = common.make_optimizer(args, net, Lion=Lion)
    evaluate = functools.partial(fid.evaluate, fid.prepare(args, device, data), args, sample_fn)    # fail early
    start = common.open_run(args, net=net, ema=ema, optimizer=optimizer)
    common.compile_in_place(args, net, ema)
    wrapped = common.distributed(net, args)
    student, teacher = (common.network(one, args.precision) for one in (wrapped, net))
    endpoint = common.network(ema if args.endpoint == 'ema' else net, args.precision, cached=False)
    clock, log, mine = common.Clock(args, device), common.Log(args, start, device), common.rank_slice(args.batch)
    settings = loss_settings(args)

    for step in clock.steps(start):
        pretraining = step < args.pretrain_steps
        done = step if pretraining else step - args.pretrain_steps
        if step == args.pretrain_steps and step > 0:                    # continue from the average, fresh optimiser
            net.load_state_dict(ema.state_dict())
            optimizer.state.clear()

        # Draws, of the global batch: the same for any number of processes (but for the dropout masks).
        index = common.batch_indices(len(data.images), args.batch, step, args.seed)
        x_all, y_all = data.at(index, device)
        if args.flip:
            x_all = common.mirror(x_all, args.seed, step, 'flip')
        eps_all = common.randn(x_all.shape, args.seed, step, 'noise', device=device)
        t, r = (level[mine] for level in level_pairs(args, step, device))

        if args.coupling == 'ot' and not pretraining:
            order = optimal_transport(x_all, eps_all)
            x_all, y_all = x_all[order], y_all[order]                   # labels travel with their images
        mu = args.mu if args.coupling == 'gc' and not pretraining else 0.0
        chosen = (common.rand((args.batch,), args.seed, step, 'mix') < mu)[mine]
        x0, y, eps = x_all[mine], y_all[mine], eps_all[mine]
        t4, r4 = t[:, None, None, None], r[:, None, None, None]

        total = torch.zeros((), device=device)
        for part, seed in common.microbatches(wrapped, args, step, clock):
            torch.manual_seed(seed)                                     # the dropout of an online endpoint
            x_hat = generator_coupling(endpoint, x0[part], eps[part], r[part], y[part], chosen[part], settings['m'])
            x_t, x_r = x_hat + t4[part] * eps[part], x_hat + r4[part] * eps[part]
            if pretraining:
                value = denoising_loss(student, x_t, t[part], x0[part], y[part], seed)
            else:
                value = loss(student, x_t, t[part], x_r, r[part], y[part], teacher, seed, **settings)
            total += common.backward(value, len(x0), args.precision, clock)

        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        common.learning_rate(optimizer, done, args.lr, args.lr_decay)
        optimizer.step()
        optimizer.zero_grad()
        if pretraining or done % args.ema_every == 0:                                                           # [5]
            common.update_ema(ema, net, ema_decay(args, step))
        log.step(step + 1, loss=total, grad_norm=grad_norm)
        if common.after_step(args, step + 1, log, evaluate, sample_fn, net=net, ema=ema, optimizer=optimizer):
            return
    common.save_final(args, ema)


# 8. The paper's diagnostics

@torch.inference_mode()
def diagnostics(net, x0, eps, y, images, labels, sigma, m=SIGMA_MIN, order=None):
    """Of each coupling at level sigma, means over a batch and an image's numbers -> {name: (cost, regulariser)}

    cost: |x - eps|² of the pairs (x, eps); regulariser: |eps - v|², where v = (x_t - E[x0 | x_t]) / sigma is the ODE's
    direction at x_t = x + sigma eps, over `images` (N, C, H, W) of the same label [6]. order: of `optimal_transport`.
    """
    t, everyone = torch.full_like(x0[:, 0, 0, 0], sigma), torch.ones(len(x0), dtype=torch.bool)
    pairs = {'IC': (x0, y), 'GC': (generator_coupling(net, x0, eps, t, y, everyone, m), y)}
    if order is not None:
        pairs['OT'] = x0[order], y[order]
    flat, results = images.flatten(1), {}
    for name, (x, classes) in pairs.items():
        x_t = x + sigma * eps
        with common.true_float32():
            logits = (x_t.flatten(1) @ flat.T - flat.square().sum(1) / 2) / sigma ** 2      # -|x_t - x0|² / (2 sigma²)
            mean = logits.masked_fill(classes[:, None] != labels, -torch.inf).softmax(1) @ flat     # E[x0 | x_t]
        v = (x_t - mean.view_as(x)) / sigma
        results[name] = (x - eps).square().mean().item(), (eps - v).square().mean().item()
    return results


def analyse(args, model, device):
    """Prints both diagnostics by noise level, of 512 images. OT needs SciPy."""
    data = common.load_data(args, device)
    net = common.network(model, args.precision)
    everyone = common.batch_indices(len(data.images), min(len(data.images), 50_000), 0, args.seed)
    images, labels = data.at(everyone, device)
    tables = {'transport cost: mean square of x - eps': {}, 'regulariser: mean square of eps - v': {}}
    for sigma in common.progress(rho_levels(12)[1:], 'noise levels'):
        found = []
        for j, index in enumerate(common.batch_indices(len(data.images), 512, 0, args.seed).split(64)):
            x0, y = data.at(index, device)
            eps = common.randn(x0.shape, args.seed, j, 'analyse', device=device)
            order = optimal_transport(x0, eps) if importlib.util.find_spec('scipy') else None
            found.append(diagnostics(net, x0, eps, y, images, labels, sigma, loss_settings(args)['m'], order))
        for i, columns in enumerate(tables.values()):
            for name in found[0]:
                columns.setdefault(name, []).append((sigma, sum(one[name][i] for one in found) / len(found)))
    common.show_panels(args, tables, 'sigma')


# 9. Command line

def add_flags(add, number):
    """The flags that are GC's own."""
    add('--coupling', choices=['ic', 'ot', 'gc'], help='of image and noise: independent, transport, generator-induced')
    add('--mu', type=number(float, 0, 1), metavar='P', help='share of generated endpoints (mu, Alg. 1)')
    add('--endpoint', choices=['ema', 'online'], help='the network that generates them; online: with dropout')
    add('--schedule', choices=['ict', 'ect'], help='from scratch on ever more levels, or tuning with ever smaller gaps')
    add('--ema-every', type=number(int, 1), metavar='N', help='steps between updates of the moving average')


def main(argv):
    """`python gc_ct.py`: trains, or with --sample / --evaluate / --analyse uses what was trained."""
    args = common.parse_args('gc_ct', __doc__, PRESETS, add_flags, argv, switch='schedule')
    if args.coupling == 'ot' and not args.use:
        optimal_transport(torch.zeros(1, 1), torch.zeros(1, 1))                 # is SciPy there?
    if args.dropout is None:
        args.dropout = 0.0 if args.coupling == 'gc' else args.dropout_ic                                        # [3]
    if not args.use:
        return train(args)
    common.use_run(args, common.start(args), load, sample, analyse)


if __name__ == '__main__':
    sys.exit(common.run(main))
