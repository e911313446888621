"""The tables and figures of the comparison in RESULTS.md, from what compare.sh ran: `python .github/compare.py`.

Distances by step are in the runs' metrics; seconds are steps times the median of what `MORE="--benchmark 50" SEEDS=0`
printed for the method, one run at a time on one core, several times in turn.
"""
import re
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import gc_ct
import sct
import vct

BASES = {'iCT': ['iCT', 'OT', 'GC', 'VC'], 'ECT': ['ECT', 'SCT', 'ECT+GC', 'ECM+VC']}
SCRIPTS = {'VC': vct, 'ECM+VC': vct, 'ECT': sct, 'SCT': sct}
RUNS, HERE = Path('runs/compare'), Path(__file__).parent


def distances(data, method):
    """{seed: {evaluations: [(step, distance), ...]}} of the runs that have ended."""
    found = {}
    for path in sorted(RUNS.glob(f'{data}-{method}-[0-9]/final.pt')):
        curves = found[int(path.parent.name[-1])] = {1: [], 2: []}
        for line in common.read_metrics(path.with_name('metrics.jsonl')):
            for name, value in line.items():
                if ' step' in name:
                    curves[int(name.split(', ')[-1].split()[0])].append((line['step'], value))
    return found


def seconds(data, method):
    """Seconds a step, the median of the benchmarks; None without."""
    found = re.findall(r'([\d.]+) s a step', (RUNS / f'{data}-{method}-0.log').read_text())
    return statistics.median(map(float, found)) if found else None


def spread(values):
    """'mean ± standard deviation', of two at least."""
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}' if len(values) > 1 else f'{values[0]:.1f}'


def table(data):
    """Distances at the end, and what they are more than the base's of the same seed: mean and deviation over seeds."""
    print(f'\n{data}\n\n| | one step | two steps | one step, less the base | two steps | seeds | s a step |')
    print('|---' * 7 + '|')
    for base, methods in BASES.items():
        base = distances(data, base)
        for method in methods:
            if found := distances(data, method):
                last = lambda runs, nfe, seeds: [runs[seed][nfe][-1][1] for seed in seeds]
                pairs = [seed for seed in found if seed in base]
                less = [[a - b for a, b in zip(last(found, nfe, pairs), last(base, nfe, pairs))] for nfe in (1, 2)]
                cells = [spread(last(found, nfe, found)) for nfe in (1, 2)]
                cells += [spread(d) if d and any(d) else '' for d in less]
                pace = seconds(data, method)
                print('| ' + ' | '.join([method, *cells, str(len(found)), f'{pace:.3f}' if pace else '']) + ' |')


def draw(data):
    """Distance against steps and seconds, with the spread over seeds; the same noise through all, one and two steps."""
    ended = {method for method in sum(BASES.values(), []) if distances(data, method)}
    for x_name in ['steps', 'seconds'] if all(seconds(data, method) for method in ended) else ['steps']:
        panels = {}
        for base, methods in BASES.items():
            for nfe in 1, 2:
                panel = panels[f'{data}: {base}, {nfe} step{"s" * (nfe > 1)}'] = {}
                for method in methods:
                    if method in ended:
                        runs = [curves[nfe] for curves in distances(data, method).values()]
                        pace = 1 if x_name == 'steps' else seconds(data, method)
                        points = [(step, [run[i][1] for run in runs]) for i, (step, _) in enumerate(runs[0])]
                        deviation = statistics.stdev if len(runs) > 1 else lambda _: 0.0
                        panel[method] = [(step * pace, statistics.mean(d), deviation(d)) for step, d in points]
        common.save_plot(panels, HERE / f'compare-{data}-{x_name}.png', x_name)
    rows = []
    for method in sum(BASES.values(), []):
        if method in ended:
            script = SCRIPTS.get(method, gc_ct)
            model = script.load(RUNS / f'{data}-{method}-0')
            rows += [script.sample(model, 16, nfe, seed=0) for nfe in (1, 2)]
    common.save_grid(torch.cat(rows), HERE / f'compare-{data}-samples.png', columns=16)


if __name__ == '__main__':
    for data in 'shapes', 'cifar10':
        if any(distances(data, base) for base in BASES):
            table(data)
            draw(data)
