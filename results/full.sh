#!/bin/bash
# Experiments at full length, 3,000 steps: the second reading of the method. Each command can be run alone; a killed one
# continues with the same command, and runs whose rows are recorded are not made again. Arms of one seed are of one commit
# (rows.jsonl names it): `git checkout` it before arms are added. Runs were made two at a time with a thread each
# (`--shard 1/2` and `--shard 2/2`, OMP_NUM_THREADS=1): 17 minutes a run.
set -e
common="--steps 3000 --eval-every 0 --precision fp32"

# Super-resolution, commit 35e5d82: the main comparison, then which constant density of timesteps is best when.
python -m lab.experiments run E1 $common --task sr --seeds 8 --first-seed 1000 --score-split test --score-clips 100 --only static stage --out results/e1-sr-3000
python -m lab.experiments run E9 $common --task sr --seeds 1 --first-seed 1001 --score-split val --only "m 0.75, s 1" "m 2, s 1" --out results/e9-sr

# Captions, commit 9917a46: clips drawn evenly, decoded by Griffin-Lim.
python -m lab.experiments run E9 $common --task t2a --seeds 1 --first-seed 1000 --score-split val --score-clips 256 --only "m 0, s 1" "m 0.75, s 1" "m 1.5, s 1" --out results/e9
