"""Images per second of fid.py's Inception network against the same layers run plainly: NCHW, batch norm apart.

    python tests/inception_speed.py [PATH OF THE WEIGHTS]
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import fid


def rate(call, n):
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return n / statistics.median(times[1:])


@torch.inference_mode()
def main(path=None):
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    plain = fid.InceptionV3().eval()
    slow = rate(lambda: plain(images), len(images))
    common.keep_freed_memory()
    fast_network = fid.load_inception(path)[0]
    fast = rate(lambda: fast_network(images), len(images))
    print(f'plain {slow:.2f} img/s, fid.py {fast:.2f} img/s: {fast / slow:.2f} times')


if __name__ == '__main__':
    main(*sys.argv[1:])
