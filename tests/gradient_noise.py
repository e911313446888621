"""How noisy the gradient of sct.py is, by the references of its target: the README's table.

    python tests/gradient_noise.py RUN [WEIGHTS [P_MEAN P_STD]]

Gradients of 32 batches of 64 images at the same weights (those of RUN, or of the file WEIGHTS): mean and deviation of
|g1 - g2| over 16 pairs of batches, and the norm of their mean. Images, levels and noise are the same for all.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import sct

B = 64


def gradient(model, data, ref_size, j, levels):
    """Gradient of the loss of batch j, all parameters in one vector."""
    net = common.network(model, 'fp32')
    normal = lambda name, *shape: common.randn((B, *shape), j, name)
    index = common.batch_indices(len(data.images), B, j, 7)
    x0, y = data.at(index, torch.device('cpu'))
    t, eps = sct.upper_level(normal('level'), *levels), normal('noise', *x0.shape[1:])
    x_t = x0 + t[:, None, None, None] * eps
    choose = lambda n: torch.randint(len(data.images), (n,), generator=common.generator(j, 'references'))
    x0_hat, eps_hat = sct.variance_reduced(data, ref_size, index, slice(0, B), x0, y, x_t, t, eps, choose)
    model.zero_grad()
    sct.loss(net, x_t, t, x0_hat, eps_hat, sct.lower_level(t, 2), y).mean().backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def main(run, weights=None, P_mean=-1.1, P_std=2.0):
    model = sct.load(run).requires_grad_(True)
    if weights:
        model.load_state_dict(torch.load(weights, weights_only=True))
    data = common.load_data(common.argparse.Namespace(**model.config), torch.device('cpu'))
    for ref_size in ('1', 'batch', '1024', 'all'):
        gradients = [gradient(model, data, ref_size, j, (float(P_mean), float(P_std))) for j in range(32)]
        noise = torch.stack([(a - b).norm() for a, b in zip(gradients[::2], gradients[1::2])])
        mean = torch.stack(gradients).mean(0).norm()
        print(f'{ref_size:>6}: {noise.mean():.2f} ± {noise.std():.2f}, mean gradient {mean:.2f}', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
