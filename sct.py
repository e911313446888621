"""Stable Consistency Tuning (SCT). Fu-Yun Wang, Zhengyang Geng, Hongsheng Li, 2024, https://arxiv.org/abs/2410.18958

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the probability
flow ODE that passes through x_t ends. Easy Consistency Tuning (ECT, Geng et al. 2024, arXiv 2406.14548) trains it by asking
that two points of one path agree, while the levels t > r of the two draw ever nearer:

    x_t = x0 + t eps,   x_r = x0 + r eps,   eps ~ N(0, I),   ln t ~ N(P_mean, P_std²)
    loss = w(t, r) d( f(x_t, t), stopgrad f(x_r, r) ),   and f(x_0, 0) = x0 where r = 0

The step from x_t to x_r follows -eps, a one-sample estimate of the ODE's direction -(x_t - E[x0 | x_t]) / t. It is right on
average, and its variance is what makes training slow and unstable. SCT takes the average over a set of references instead
(Sec. 4.1; the estimator of Xu et al. 2023, arXiv 2302.00670):

    w_i = softmax_i( -|x_t - x^(i)|² / (2 t²) ),   x0_hat = sum_i w_i x^(i)            references x^(i) ~ p(x0 | y), x0 among them
    eps_hat = (x_t - x0_hat) / t,                  x_r = x0_hat + r eps_hat            and the target is x0_hat where r = 0

    python sct.py                                                 # ten shapes, five minutes on two CPU cores
    python sct.py --dataset cifar10 --gpus 8                      # the paper's setting
    python sct.py --sample runs/sct-shapes --nfe 2                # a grid of images
    python sct.py --evaluate runs/sct-cifar10 --nfe 1,2           # FID

Choices where the paper leaves one, and deviations:
 1. The references of `--ref-size batch` are the global minibatch, over all processes: our reading of "a batch".
 2. `--ref-size all` takes the whole training set, and so the exact score of it: beyond the paper. It costs a matrix product.
 3. With labels (`--cond`) an image's references are those of its own label; their number is counted before that.
 4. `--pretrain-steps` trains the diffusion model that tuning starts from in the same run; the paper starts from a published one.
 5. Training has f(x, t) -> x at t = 0, so that a diffusion model is a valid start; sampling at t = sigma_min, as ECT has it.
"""
import copy
import sys
from pathlib import Path

import torch

import common
import fid
from unet import SongUNet

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

ECT = dict(                     # ECT's settings for CIFAR-10 (its Table 6), which SCT keeps
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and deviation
    q=2.0, k=8.0, b=1.0,        # the gap between t and r: see `lower_level`
    stages=8,                   # q^-1 ... q^-8: the gap halves so many times over the run
    c=0.0, weighting='gap',     # distance sqrt(|u|² + c²) - c, weight 1 / (t - r)
    t_mid=0.821,                # noise level of the second step when sampling with two
    optimizer='RAdam', ref_size='batch', pretrain_steps=0, cond=False, fid_features='inception', fid_num=50_000)
PRESETS = {
    'shapes': ECT | dict(       # built in; ours, sized for two CPU cores
        resolution=16, width=32, mults=[1, 2], blocks=1, attn_resolutions=[], dropout=0.0, cond=True,
        batch=64, steps=3000, pretrain_steps=1000, optimizer='Adam', lr=1e-3, ema=0.995, ref_size='all',
        save_every=500, sample_every=500, eval_every=3000, fid_features='pixels', fid_num=2000),
    'cifar10': ECT | dict(      # DDPM++; ECT Table 6, SCT Sec. 5
        resolution=32, width=128, mults=[2, 2, 2], blocks=4, attn_resolutions=[16], dropout=0.2,
        batch=128, steps=400_000, lr=1e-4, ema=0.9999, save_every=5000, sample_every=5000),
    'folder': ECT | dict(       # your images: the settings of CIFAR-10, one more level at 64x64
        width=128, mults=[2, 2, 2], blocks=4, attn_resolutions=[16], dropout=0.2,
        batch=128, steps=400_000, lr=1e-4, ema=0.9999, save_every=5000, sample_every=5000),
}


# 2. Noise levels

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


def upper_level(normal, P_mean, P_std):
    """t of a standard normal draw: ln t ~ N(P_mean, P_std²). (B,) -> (B,)"""
    return (P_mean + P_std * normal).exp()


def lower_level(t, stage, q=2.0, k=8.0, b=1.0):
    """r < t of a pair (ECT Eq. 20): r = t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0 where that is below. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


# 3. Model

def make_network(args):
    """The network F of random weights that the settings describe."""
    return SongUNet(args.resolution, args.in_channels, args.in_channels, label_dim=args.label_dim, model_channels=args.width,
                    channel_mult=args.mults, num_blocks=args.blocks, attn_resolutions=args.attn_resolutions, dropout=args.dropout)


def f(net, x, t, y=None, m=0.0):
    """The consistency function (EDM Eq. 7 with iCT's shift): c_skip x + c_out F(c_in x, ln(t)/4, y), equal to x at t = m.

    net is any function (x_in, c_noise, y) -> like x_in; x (B, C, H, W), t (B,), y (B,) labels or None -> (B, C, H, W).
    """
    s = SIGMA_DATA
    t4 = t[:, None, None, None]
    c_skip = s ** 2 / ((t4 - m) ** 2 + s ** 2)
    c_out = s * (t4 - m) / (s ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (s ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.log() / 4, y)


# 4. The target: where the step from t to r begins and leads

CHUNK = 2 ** 23         # how many numbers of the references are float32 at a time: 32 MiB


def posterior_mean(x_t, t, refs, allowed=None):
    """E[x0 | x_t] if x0 is one of `refs` (SCT Sec. 4.1): softmax-weighted mean by -|x_t - x^(i)|² / (2 t²).

    x_t (B, C, H, W), t (B,), refs (N, C, H, W) in [-1, 1] or uint8; allowed (B, N) bool: who may refer to whom, all if None
    -> (B, C, H, W). One reference gives itself back: ECT. Runs over chunks of the references, with a running maximum and sum,
    so that memory stays bounded.
    """
    x, t = x_t.flatten(1), t[:, None]                                                       # (B, D), (B, 1)
    top, total, mean = torch.full_like(t, -1e30), torch.zeros_like(t), torch.zeros_like(x)
    chunk = max(1, CHUNK // x.shape[1])
    with common.true_float32():
        for i in range(0, len(refs), chunk):
            c = refs[i:i + chunk].to(x.device).flatten(1)                                   # (n, D)
            c = common.normalise(c) if c.dtype == torch.uint8 else c
            logits = (x @ c.T - c.square().sum(1) / 2) / t ** 2                             # |x|² is the same for all i
            if allowed is not None:
                logits = logits.masked_fill(~allowed[:, i:i + chunk], -torch.inf)
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            weights, shrink = (logits - new_top).exp(), (top - new_top).exp()               # (B, n), (B, 1)
            total = total * shrink + weights.sum(1, keepdim=True)
            mean, top = mean * shrink + weights @ c, new_top
    return (mean / total).view_as(x_t)


def references(data, ref_size, index, mine, x0, y, draw):
    """Which images stand for p(x0 | y) in this step. -> refs (N, C, H, W), allowed (b, N) bool or None

    index (B,): the global batch within `data`, of which x0 (B, C, H, W) are the images, y (B,) the labels or None, and the
    slice `mine` this process's part, of b. draw(n) gives n random indices. x0 is among every sample's references, once.
    """
    if ref_size == 'batch':
        return x0, None if y is None else y[mine, None] == y
    if ref_size == 'all':
        return data.images, None if y is None else y[mine, None] == data.labels.to(y.device)
    others = draw(int(ref_size) - 1)                                                        # shared by the batch
    refs, ref_labels = data.at(others, x0.device)
    allowed = (index[mine, None] != others).to(x0.device)
    if y is not None:
        allowed = allowed & (y[mine, None] == ref_labels)
    own = torch.eye(len(allowed), dtype=torch.bool, device=x0.device)                       # each sample's own image
    return torch.cat([refs, x0[mine]]), torch.cat([allowed, own], dim=1)


def target(data, ref_size, index, mine, x_all, y_all, x_t, t, eps, draw):
    """x0_hat and eps_hat = (x_t - x0_hat) / t for this process's x_t (b, C, H, W), t (b,); see `references` for the rest."""
    if ref_size == '1':
        return x_all[mine], eps                             # x0 alone: ECT, without a rounding on the way back to eps
    x0_hat = posterior_mean(x_t, t, *references(data, ref_size, index, mine, x_all, y_all, draw))
    return x0_hat, (x_t - x0_hat) / t[:, None, None, None]


# 5. Loss

def loss(net, x_t, t, x0_hat, eps_hat, r, y=None, teacher=None, mask=0, weighting='gap', c=0.0):
    """Consistency loss of each sample (ECT Eq. 11 with SCT's target). -> (B,)

    The student f(x_t, t) is drawn to the teacher f(x_r, r) at x_r = x0_hat + r eps_hat, and to x0_hat where r = 0.
    `mask` seeds the dropout: student and teacher drop the same units, so that their difference is not that of two masks.
    """
    x_r = x0_hat + r[:, None, None, None] * eps_hat
    torch.manual_seed(mask)
    student = f(net, x_t, t, y)
    with torch.no_grad():
        torch.manual_seed(mask)
        target = f(teacher or net, x_r, torch.where(r > 0, r, t), y)                        # at r = 0 the value is not used
        target = torch.where(r[:, None, None, None] > 0, target, x0_hat)
    norm = torch.linalg.vector_norm((student - target).flatten(1), dim=1)                   # |u|; its gradient at 0 is 0
    distance = (norm.square() + c ** 2).sqrt() - c if c else norm                           # pseudo-Huber (iCT Sec. 3.3)
    return distance * (1 / (t - r) if weighting == 'gap' else edm_weight(t))


def denoising_loss(net, x_t, t, x0_hat, y=None, mask=0):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), with SCT's posterior mean as its target. -> (B,)

    EDM sums over the pixels; the mean keeps the first steps of RAdam small, which do not divide by the gradient's size.
    """
    torch.manual_seed(mask)
    return edm_weight(t) * (f(net, x_t, t, y) - x0_hat).square().flatten(1).mean(1)


def edm_weight(t):
    """lambda(t) = (t² + s²) / (t s)² (EDM Table 1). (B,) -> (B,)"""
    return (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2


# 6. Sampling

@torch.inference_mode()
def sample(model, n, nfe=1, labels=None, seed=0):
    """n images in [-1, 1], (n, C, H, W), with `nfe` network evaluations each; labels: list of classes, taken in turn.

    One step: f(sigma_max z, sigma_max). Each further one adds fresh noise of a lower level and maps back (CM Alg. 1).
    """
    config, device = model.config, next(model.parameters()).device
    net = common.network(model, config['precision'], device)
    levels = [SIGMA_MAX * (1 + i / nfe * ((SIGMA_MIN / SIGMA_MAX) ** (1 / 7) - 1)) ** 7 for i in range(nfe)]    # EDM Eq. 5
    if nfe == 2:
        levels[1] = config['t_mid']
    y = common.choose_labels(n, labels, config['label_dim'])
    shape, images = (n, config['in_channels'], config['resolution'], config['resolution']), []
    noise = [common.randn(shape, seed, i, 'sample') for i in range(nfe)]
    for part in torch.arange(n).split(250):
        x = 0
        for t, z in zip(levels, noise):
            t = torch.full((len(part),), t, device=device)
            x = f(net, x + t[:, None, None, None] * z[part].to(device), t, None if y is None else y[part].to(device), SIGMA_MIN)
        images.append(x.clamp(-1, 1))
    return torch.cat(images)


def load(path, device='cpu'):
    """The EMA network of a run (its folder, checkpoint.pt or final.pt), for `sample`; its settings are in `.config`."""
    state = common.load_checkpoint(path)
    model = make_network(common.argparse.Namespace(**state['config']))
    common.restore(model, state['ema'], path)
    model.config = state['config']
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


# 7. Training

def train(args):
    """One run, from data to final.pt."""
    device = common.start(args)
    data = common.load_data(args).to(device)
    common.fit_to_data(args, data)                                              # sets resolution, in_channels, label_dim

    torch.manual_seed(args.seed)
    net = make_network(args).to(device, memory_format=torch.channels_last)      # channels last: convolutions run faster
    net.config = common.config_of(args)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    make_optimizer = lambda: getattr(torch.optim, args.optimizer)(net.parameters(), lr=args.lr, foreach=True)   # foreach: few fused updates
    optimizer, start = make_optimizer(), 0
    state = common.open_run(args)
    if state:
        common.restore(net, state['net'], args.out)
        common.restore(ema, state['ema'], args.out)
        common.restore(optimizer, state['optimizer'], args.out)
        start = state['step']
    if args.compile:
        net.compile()
    wrapped = common.distributed(net)
    student, teacher = (common.network(module, args.precision, device) for module in (wrapped, net))
    mine = common.my_part(args.batch)
    log, clock = common.Log(args, start, device), common.Clock(args, device)

    for step in range(start, start + args.benchmark + 3 if args.benchmark else args.steps):
        if step == args.pretrain_steps > 0:                                     # tuning starts as from a checkpoint
            net.load_state_dict(ema.state_dict())
            optimizer = make_optimizer()

        clock('log')
        if clock.next_step():
            return

        # Draws. Made for the global batch, so that any number of processes trains on the same ones.
        index = common.batch_indices(len(data.images), args.batch, step, args.seed)
        draw = lambda n: common.randint(len(data.images), n, args.seed, step, 'references')
        normal = lambda stream, *shape: common.randn((args.batch, *shape), args.seed, step, stream, device=device)[mine]
        x_all, y_all = data.at(index, device)
        x0, y = x_all[mine], None if y_all is None else y_all[mine]
        pretraining = step < args.pretrain_steps
        t = upper_level(normal('level'), *(-1.2, 1.2) if pretraining else (args.P_mean, args.P_std))  # EDM Table 1 while pretraining
        eps = normal('noise', *x0.shape[1:])
        clock('data')

        # Target.
        x_t = x0 + t[:, None, None, None] * eps
        x0_hat, eps_hat = target(data, args.ref_size, index, mine, x_all, y_all, x_t, t, eps, draw)
        clock('reference mean')

        # Loss and gradient.
        stage = (step - args.pretrain_steps) * args.stages // (args.steps - args.pretrain_steps)
        r = lower_level(t, stage, args.q, args.k, args.b)
        total = torch.zeros((), device=device)
        for i, part in enumerate(common.microbatches(wrapped, len(x0), args.microbatch)):
            mask = common.key(args.seed, step, 'dropout', common.rank(), i)
            y_part = None if y is None else y[part]
            if pretraining:
                value = denoising_loss(student, x_t[part], t[part], x0_hat[part], y_part, mask)
            else:
                value = loss(student, x_t[part], t[part], x0_hat[part], eps_hat[part], r[part], y_part, teacher, mask,
                             args.weighting, args.c)
            clock('forward')
            (value.sum() * common.LOSS_SCALE.get(args.precision, 1.0) / len(x0)).backward()
            total += value.detach().sum() / len(x0)
            clock('backward')

        # Update.
        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock('optimiser')
        common.update_ema(ema, net, args.ema)
        clock('EMA')
        log.step(step + 1, loss=total, grad_norm=grad_norm)
        if log.due(step + 1, args.sample_every) and common.rank() == 0:
            common.save_grid(sample(ema, 64, seed=args.seed), Path(args.out) / 'samples' / f'{step + 1:07}.png')
            common.save_curves(log.path, Path(args.out) / 'curves.png')
        if log.due(step + 1, args.eval_every):
            for nfe in args.nfe:
                name, value = evaluate(ema, args, data, device, nfe)
                log.write({'step': step + 1, f'{name}, {nfe} step': value})
        if log.due(step + 1, args.save_every) or log.stop:
            common.save_checkpoint(args, step + 1, net, ema, optimizer)
        if log.stop:
            common.say(f'stopped after step {step + 1:,}; go on with: python sct.py --resume --out {args.out}')
            return
    common.save_final(args, ema)


def evaluate(model, args, data, device, nfe):
    """Fréchet distance of samples of `model`, printed. -> (name, value)"""
    name, value = fid.evaluate(args, data, lambda j, n: sample(model, n, nfe, args.labels, common.key(args.seed, j)), device)
    common.say(f'{name}, {nfe} step{"s" * (nfe > 1)}: {value:.4f}')
    return name, value


# 8. Command line

def ref_size(text):
    """Type of --ref-size."""
    if text not in ('batch', 'all') and not (text.isdecimal() and int(text) > 0):
        raise common.argparse.ArgumentTypeError(f'{text} is not a number, `batch` or `all`')
    return text


def add_flags(parser):
    """The flags that are SCT's own."""
    add = parser.add_argument_group('method').add_argument
    add('--ref-size', type=ref_size, metavar='1|batch|N|all',
        help='references of the posterior mean (Sec. 4.1): 1 is ECT, batch the minibatch, N as many drawn each step, all the data')


def main(argv):
    """`python sct.py`: trains, or with --sample / --evaluate uses what was trained."""
    args = common.parse_args('sct', __doc__, PRESETS, add_flags, argv)
    if args.dry_run:
        return common.say(common.json.dumps(common.config_of(args), indent=2))
    if not (args.sample or args.evaluate):
        return train(args)
    device = common.start(args)
    model = load(args.sample or args.evaluate, device)
    if args.sample:
        for nfe in args.nfe:
            common.save_sample(args, nfe, sample(model, args.n, nfe, args.labels, args.seed))
    else:
        data = None if args.fid_ref else common.load_data(args)
        for nfe in args.nfe:
            evaluate(model, args, data, device, nfe)


if __name__ == '__main__':
    sys.exit(common.run(main))
