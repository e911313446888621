"""How far SCT's target is from the exact posterior mean over 10,000 CIFAR-10 images, by the number of references.

    python tests/target_distance.py [FOLDER WITH CIFAR-10]

Mean square per number of x0_hat - E[x0 | x_t], over 1,024 points x_t in batches of 128, unconditional.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import sct

B, BATCHES = 128, 8


def main(folder='data'):
    data = common.cifar10(Path(folder))
    data = common.Data(data.images[:10_000], torch.zeros(10_000), 0, None)
    sizes = ['1', '128', '1024', 'all']
    print('    t   ' + ''.join(f'{size:>10}' for size in sizes))
    for level in (0.3, 1.0, 3.0, 10.0, 30.0):
        errors = dict.fromkeys(sizes, 0.0)
        for j in range(BATCHES):
            index = common.batch_indices(len(data.images), B, j, 0)
            x0, y = data.at(index, torch.device('cpu'))
            t, eps = torch.full((B,), level), common.randn(x0.shape, j, 'noise')
            x_t = x0 + level * eps
            choose = lambda n: torch.randint(len(data.images), (n,), generator=common.generator(j, 'references'))
            hat = lambda size: sct.variance_reduced(data, size, index, slice(0, B), x0, y, x_t, t, eps, choose)[0]
            exact = hat('all')
            for size in sizes:
                errors[size] += (hat(size) - exact).square().mean().item() / BATCHES
        print(f'{level:5g}   ' + ''.join(f'{errors[size]:10.4f}' for size in sizes), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
