#!/bin/bash
# The tables of docs/results.md at 400 steps, of the first reading of the method: `git checkout a63cd9e` comes first
# (the rows that are recorded are of earlier commits, which rows.jsonl names). Run from the project's folder, five to
# six hours on two cores. With the three settings below each command can be run alone, and a killed one continues with
# the same command. E3 and E2 take over what others have run. ESC-10: a folder of its clips with metadata.csv, as the
# first argument.
set -e
captions="--task t2a --precision bf16 --seeds 8 --steps 400 --score-clips 300 --score-split test --judge final --jobs 2"
restored="--task sr --precision bf16 --seeds 8 --steps 400 --eval-every 200 --score-clips 60 --score-split test"
development="--task t2a --precision bf16 --seeds 2 --first-seed 100 --steps 400 --eval-every 400 --score-clips 200 --score-split val --jobs 2"
python -m lab.experiments run E1 $captions --eval-every 100 --only vanilla static clock stage --out results/e1
python -m lab.experiments run E3 $captions --eval-every 100 --only slope clock random --out results/e3
python -m lab.experiments run E4 $captions --eval-every 200 --out results/e4
python -m lab.experiments run E2 $captions --eval-every 200 --only none guidance timesteps structure guidance+timesteps+structure --out results/e2
python -m lab.experiments run E1 $restored --only vanilla static clock stage --out results/e1-sr
python -m lab.experiments run E1 $restored --data "${1:-path/to/esc10}" --val-fold 5 --only vanilla static stage --jobs 2 --out results/e1-esc10
python -m lab.experiments run E7 $development --only "home: clock to 0.5 K" "home: clock to 1 K" "home: clock to 2 K" "batch 16: clock to 0.5 K" "batch 16: clock to 1 K" "batch 16: clock to 2 K" --out results/e7-dev
python -m lab.experiments run E7 $captions --eval-every 200 --tuned results/e7-dev --only "batch 16: stage" "batch 16: clock to 1 K (frozen)" "batch 16: clock to 2 K (re-tuned)" --out results/e7
