#!/bin/bash
# Experiments at full length, 3,000 steps: the second reading of the method. Each command can be run alone; a killed one
# continues with the same command. All arms of a seed are of one commit (rows.jsonl names it; on seeds 1002 and 1003 of
# captions `static` and `stage` are of an earlier one than the others): run the command in a checkout of that commit, where
# this file may be missing, before arms are added to one. Two runs at a time with a thread each (`--shard 1/2` and
# `--shard 2/2`, OMP_NUM_THREADS=1) take 14 to 30 minutes a run, evaluations besides, on a CPU with AVX2 alone.
set -e
restored="--steps 3000 --eval-every 0 --precision fp32 --task sr"
captions="--steps 3000 --eval-every 0 --precision fp32 --task t2a"

# Super-resolution, commit 35e5d82, development seeds: what of `stage` costs how much; which constant density is best when.
# In the recorded table arms of one seed were run on seed 1000 alone.
python -m lab.experiments run E1 $restored --seeds 2 --first-seed 1000 --score-split test --score-clips 100 --out results/e1-sr-dev \
  --only static stage \
  --arm 'guidance decays={"recipe": "stage", "timesteps": "constant"}' \
  --arm 'timesteps move={"recipe": "stage", "guidance": "constant"}' \
  --arm 'no guidance={"recipe": "static", "guidance": "off"}' \
  --arm 'm 1 to 2, guidance constant={"recipe": "stage", "guidance": "constant", "m_early": 1.0, "m_late": 2.0}' \
  --arm 'm 2={"recipe": "static", "m": 2.0}' --arm 'm 3={"recipe": "static", "m": 3.0}'
python -m lab.experiments run E9 $restored --seeds 1 --first-seed 1001 --score-split val --only "m 0.75, s 1" "m 2, s 1" --out results/e9-sr

# Super-resolution, commit fc1b217: the comparison itself.
python -m lab.experiments run E1 $restored --seeds 8 --first-seed 1002 --score-split test --score-clips 200 --only vanilla static stop clock stage permuted --out results/e1-sr-full

# The first seed again, on another processor: what is rounding?
python -m lab.experiments run E1 $restored --seeds 1 --first-seed 1002 --score-split test --score-clips 200 --only static stage --out results/e1-sr-repeat

# Super-resolution, commit 95e5ae4, eight blocks: does a structure loss help? Of eight seeds 1002 to 1005 so far.
python -m lab.experiments run E2 $restored --seeds 8 --first-seed 1002 --score-split test --score-clips 200 --only none "groups by depth" --out results/e2-sr-full

# Captions, commit 2dcdfb6: one development seed; then the comparison itself, recorded by fc1b217, which trains alike, from
# 1004 on and in all other arms, also of the development seed. `guidance alone` has seeds 1002 and 1003 so far.
python -m lab.experiments run E1 $captions --seeds 1 --first-seed 1000 --score-split val --score-clips 256 --out results/e1-dev \
  --only static stage "m 2" "m 3" --arm 'm 2={"recipe": "static", "m": 2.0}' --arm 'm 3={"recipe": "static", "m": 3.0}'
python -m lab.experiments run E1 $captions --seeds 8 --first-seed 1002 --judge final --score-clips 500 --out results/e1-full \
  --only static stop clock stage permuted vanilla "guidance alone" "density alone" \
  --arm 'guidance alone={"recipe": "static", "timesteps": "off"}' --arm 'density alone={"recipe": "static", "guidance": "off"}'

# The first of these seeds again, on another processor.
python -m lab.experiments run E1 $captions --seeds 1 --first-seed 1002 --judge final --score-clips 500 --only static stage --out results/e1-repeat

# Captions, commit 9917a46: clips drawn evenly, decoded by Griffin-Lim.
python -m lab.experiments run E9 $captions --seeds 1 --first-seed 1000 --score-split val --score-clips 256 --only "m 0, s 1" "m 0.75, s 1" "m 1.5, s 1" --out results/e9
