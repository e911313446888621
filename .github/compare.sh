#!/usr/bin/env bash
# Prints the commands of the comparison in RESULTS.md, one a line: eight methods, all else equal. To run them, two at a
# time with one thread each; what was cut short goes on, what is done is done again in a minute:
#     bash .github/compare.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
seeds=${SEEDS:-0 1 2} data=${DATA:-shapes cifar10} methods=${METHODS:-iCT OT GC VC ECT SCT ECT+GC ECM+VC}     # and LR, MORE: other flags

shapes="--steps 10000 --eval-every 1000 --save-every 1000"
cifar10="--dataset cifar10 --resolution 16 --width 32 --mults 1,1,2 --blocks 1 --attn-resolutions 0 --fid-features pixels
         --fid-num 2000 --steps 5000 --eval-every 500 --save-every 1000"
same="--batch 32 --dropout 0 --optimizer Adam --betas 0.9,0.999 --lr-decay 100 --ema 0.995 --nfe 1,2
      --sample-every 5000 --no-flip"
ict="--s0 10 --s1 160" ect="--init none --pretrain-steps 1000 --stages 5"      # VC: as the others no clipping, |u|
declare -A flags=(
  [iCT]="gc_ct.py --coupling ic $ict --ema-every 1" [OT]="gc_ct.py --coupling ot $ict --ema-every 1"
  [GC]="gc_ct.py --coupling gc --mu 0.5 $ict --ema-every 1"
  [VC]="vct.py --base ict $ict --encoder-width 16 --clip 0 --huber vector --beta 3"
  [ECT]="sct.py --ref-size 1 --schedule ect $ect" [SCT]="sct.py --ref-size all --schedule smooth $ect"
  [ECT+GC]="gc_ct.py --schedule ect --coupling gc --mu 0.3 $ect --ema-every 1"
  [ECM+VC]="vct.py --base ecm $ect --encoder-width 16 --clip 0 --beta 3")
declare -A rate=([iCT]=2e-3 [ECT]=2e-3)           # the best of three on `shapes`, see RESULTS.md

mkdir -p runs/compare
for seed in $seeds; do
  for set in $data; do
    for method in $methods; do
      base=iCT; [[ $method =~ EC|SCT ]] && base=ECT
      lr=${LR:-${rate[$base]}}
      out=runs/compare/$set-$method-$seed${LR:+-$LR}
      echo python ${flags[$method]} ${!set} $same --lr $lr --seed $seed $MORE --out $out "\$(test -e $out && echo --resume) >> $out.log"
    done
  done
done
