#!/usr/bin/env bash
# What one GPU can tell in some 25 minutes, added to the file gpu.txt: `bash .github/gpu.sh [tests] [train] [speed]
# [compiled]`, all four if none is named, each below nine minutes. CIFAR-10 and the Inception weights are downloaded
# unless data/ holds them.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() {     # run SECONDS COMMAND: the last lines that it prints; nothing of it goes on after so many seconds
  printf '\n$ %s\n' "${*:2}"
  timeout -k 20 "$1" "${@:2}" 2>&1 | tr '\r' '\n' | tail -n "${LINES_SHOWN:-9}"
}
cifar10='--dataset cifar10 --init none'
before() { (( SECONDS - begun < $1 * 60 )); }       # before this minute of the part

tests() {   # what compiles takes long: last
  LINES_SHOWN=75 run 280 python -m pytest -v --tb=line tests/test_gpu.py -k 'not compiled and not True'
  LINES_SHOWN=45 run 220 python -m pytest -v --tb=line tests/test_gpu.py -k 'compiled or True'
}

train() {   # from the same diffusion model; then 50,000 samples
  for method in 'sct --ref-size all --schedule smooth' 'ect --ref-size 1 --schedule ect'; do
    set -- $method
    run 160 python sct.py $cifar10 --pretrain-steps 300 --steps 1000 --precision bf16 --ema 0.995 "${@:2}" --overwrite \
      --out "runs/gpu-$1"
  done
  for name in sct ect; do
    run 90 bash -c "time python sct.py --evaluate runs/gpu-$name --precision bf16"
  done
}

speed() {   # the parts of a step, images a second, share of the product's rate
  run 90 python sct.py $cifar10 --batch 16 --precision bf16 --benchmark 20       # a GPU of eight
  run 90 python sct.py $cifar10 --batch 512 --precision bf16 --ref-size 1 --benchmark 10
  for batch in 512 128; do
    for precision in bf16 tf32 fp16 fp32; do
      for script in sct.py gc_ct.py vct.py; do
        before 6 && run 120 python $script $cifar10 --batch $batch --precision $precision --benchmark 10
      done
    done
  done
}

compiled() {
  for precision in bf16 tf32; do
    for script in sct.py vct.py gc_ct.py; do
      before 5 && run 200 python $script $cifar10 --batch 512 --precision $precision --compile --benchmark 10
    done
  done
}

all() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'
  for part in "$@"; do
    begun=$SECONDS
    $part
    printf '\n%s: %s s\n' "$part" $((SECONDS - begun))
  done
}
[ $# -gt 0 ] || set -- tests train speed compiled
all "$@" 2>&1 | tee -a gpu.txt
