"""What only a GPU can show: skipped where there is none. Some minutes, `python -m pytest -q tests/test_gpu.py`."""
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')         # before CUDA starts: for the deterministic runs
import common
import fid
import sct
import unet
from conftest import ROOT, SMALL, TUNING, lines, same, weights, wide

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
PRECISIONS = {'fp32': 1e-4, 'tf32': 0.01, 'fp16': 0.01, 'bf16': 0.05}       # relative error of a loss
GPU = 'cuda'
both = pytest.mark.parametrize('kind', [unet.SongUNet, unet.EDM2UNet])


def make(kind, dropout=0.0, width=64):
    torch.manual_seed(0)
    net = kind(16, 3, 3, model_channels=width, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,),
               dropout=dropout)
    for name, p in net.named_parameters():
        p.data += 1 if name == 'out_gain' else 0.02 * torch.randn_like(p)       # no layer that starts at zero
    return net


def batch(n=8, gap=0.5):
    x0, eps = torch.randn(2, n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.5, 5, n)
    r = gap * t
    return x0 + wide(t) * eps, t, x0 + wide(r) * eps, r


def on(device, net, values):
    return net.to(device, memory_format=torch.channels_last), [value.to(device) for value in values]


@pytest.mark.parametrize('precision, compiled, width', [        # 128: attention of 256 channels a head, as CIFAR-10's
    *((p, False, 64) for p in PRECISIONS), ('fp32', True, 64), ('bf16', True, 64), ('bf16', False, 128),
    ('fp16', False, 128)])
@both
def test_losses_and_gradients_are_those_of_the_cpu(kind, precision, compiled, width, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', precision == 'tf32')
    found = {}
    for device, arithmetic in (('cpu', 'fp32'), (GPU, precision)):
        net, values = on(device, make(kind, width=width), batch())
        if compiled and device == GPU:
            net.compile(dynamic=False)
        loss = sct.loss(common.network(net, arithmetic), *values)
        loss.mean().backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm()
        found[device] = torch.cat([loss.detach().cpu(), norm.cpu()[None]])
    torch.testing.assert_close(found[GPU], found['cpu'], rtol=PRECISIONS[precision], atol=0)


@pytest.mark.parametrize('compiled', [False, True])
@both
def test_student_and_teacher_have_the_same_dropout(kind, compiled):
    net, (x, t, _, _) = on(GPU, make(kind, dropout=0.3).train(), batch())
    if compiled:
        net.compile(dynamic=False)
    call = common.network(net, 'bf16')
    outputs = []
    for seed, grad in ((1, True), (1, False), (2, False)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            outputs.append(sct.f(call, x, t))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.02)
    assert (outputs[1] - outputs[2]).abs().max() > 0.05


@both
def test_attention_takes_a_fast_kernel_and_blocks_keep_channels_last(kind):
    net, (x, t, _, _) = on(GPU, make(kind), batch())
    last, layout = [], torch.channels_last
    for block in [*net.enc.values(), *net.dec.values()]:
        block.register_forward_hook(lambda block, x, y: last.append(y.is_contiguous(memory_format=layout)))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        common.network(net, 'bf16')(x, t).sum().backward()
    assert last and all(last)


@pytest.mark.parametrize('flags', [(), ('--compile',)], ids=['eager', 'compiled'])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_twenty_steps(script, precision, flags):
    assert script.train('--steps', 20, '--precision', precision, '--nfe', '1,2', '--eval-every', 20, *flags) == 0
    assert all(isinstance(line.get('loss', 0.0), float) for line in lines(script.out))
    torch._dynamo.reset()


def test_no_step_waits_for_the_device(script, after_step):
    after_step(12, lambda: torch.cuda.set_sync_debug_mode('error'))         # the log reads blocks of ten steps
    after_step(18, lambda: torch.cuda.set_sync_debug_mode('default'))
    try:
        assert script.train(*TUNING[script.name], '--steps', 20, '--dropout', 0.1) == 0
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_a_resumed_run_is_the_run_and_goes_on_without_a_gpu(script, monkeypatch):
    start = common.start

    def deterministic(args):
        device = start(args)
        torch.backends.cudnn.benchmark = False
        return device
    monkeypatch.setattr(common, 'start', deterministic)
    torch.use_deterministic_algorithms(True)
    try:
        script.train('--steps', 8, '--out', 'whole')
        script.train('--steps', 8, '--out', 'parts', '--save-every', 4)
        os.replace('parts/previous.pt', 'parts/checkpoint.pt')              # of step 4
        assert script.run('--resume', '--out', 'parts') == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights('whole'), weights('parts'))
    os.replace('parts/previous.pt', 'parts/checkpoint.pt')
    assert script.run('--resume', '--out', 'parts', '--device', 'cpu') == 0
    for a, b in zip(weights('whole').values(), weights('parts').values()):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)               # other random numbers


def test_samples_are_those_of_the_cpu(script):
    script.train('--steps', 8)
    images = [script.module.sample(script.module.load(script.out, device), 16, 2, seed=3) for device in (GPU, 'cpu')]
    torch.testing.assert_close(images[0].cpu(), images[1], rtol=0, atol=2e-3)


def in_processes(n, change, out, tmp_path, **env):
    """n processes of sct.py, whose keywords to init_process_group are changed by `change`, code."""
    code = f'''if 1:
        import sys, torch.distributed as dist
        sys.path.insert(0, sys.argv.pop(1))
        begin = dist.init_process_group
        dist.init_process_group = lambda backend, **more: begin({change})
        import common, sct
        sys.exit(common.run(sct.main))'''
    flags = [*SMALL, *'--steps 6 --no-cond --ref-size 4 --pretrain-steps 2 --eval-every 100 --out'.split(), out]
    env = dict(os.environ, INIT_METHOD=f'file://{tmp_path}/meet-{out}', WORLD_SIZE=str(n)) | env
    command = [sys.executable, '-c', code, str(ROOT), *flags]
    runs = [subprocess.Popen(command, env=env | dict(RANK=str(i), LOCAL_RANK=str(i))) for i in range(n)]
    assert [run.wait(300) for run in runs] == [0] * n


def test_two_processes_on_one_gpu_are_one(few_shapes, tmp_path):
    """By gloo, as NCCL wants a GPU for each; what the launcher's --gpus 2 does where there are two."""
    for n in (1, 2):
        in_processes(n, '"gloo", **more | dict(device_id=None)', f'by-{n}', tmp_path)
    for name, value in weights('by-1').items():
        torch.testing.assert_close(weights('by-2')[name], value, rtol=1e-3, atol=1e-4)


def test_nccl_meets_and_averages(few_shapes, tmp_path):
    """All that eight GPUs ask of NCCL, in a group of the first of two processes alone."""
    in_processes(1, 'backend, **more | dict(world_size=1)', 'alone', tmp_path, WORLD_SIZE='2')
    assert all(isinstance(line.get('loss', 0.0), float) for line in lines('alone'))


def test_the_posterior_mean_is_not_rounded_to_tf32(monkeypatch):
    torch.set_float32_matmul_precision('high')
    x, refs, t = torch.randn(16, 3, 8, 8), torch.randn(300, 3, 8, 8), torch.linspace(0.2, 5, 16)
    exact = sct.posterior_mean(x.double(), t.double(), refs.double()).float()
    torch.testing.assert_close(sct.posterior_mean(x.cuda(), t.cuda(), refs.cuda()).cpu(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.assets
def test_inception_features_are_those_of_the_cpu(real):
    path = str(real('inception-2015-12-05.pth'))
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    a, b = (fid.load_inception(path, None, torch.device(device))[0](images.to(device)).cpu() for device in (GPU, 'cpu'))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * b.abs().max().item())


def test_memory_and_the_benchmark(script, capsys):
    """CIFAR-10's network takes some 130 MiB an image, in float32."""
    flags = ['--resolution', 32, '--width', 128, '--mults', '2,2,2', '--blocks', 4, '--batch', 32, '--benchmark', 3]
    assert script.run(*flags, '--no-cond', '--pretrain-steps', 0, *(['--ref-size', 4] * (script.name == 'sct'))) == 0
    text = capsys.readouterr().out
    assert 'of a matrix product in fp32' in text
    assert float(text.split('peak memory ')[1].split()[0]) < 32 * 0.134 * 1.6 + 2
