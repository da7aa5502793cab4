#!/usr/bin/env bash
# LPT, the control of StateX: the same post-training of a pretrained Mamba2 model on long sequences, with no layer expanded.
# 8 GPUs by default.
#
#   bash scripts/mamba2_LPT.sh                                # edit the variables below, or override them here:
#   bash scripts/mamba2_LPT.sh n_gpus=4 run_name=my_run
#   bash scripts/mamba2_LPT.sh plan=true init_from=scratch    # what the run would do, without weights or GPUs
#   bash scripts/mamba2_LPT.sh scale=tiny                     # the same path on a CPU

model_name=mamba2-1.3B                    # a file in configs/models
ckpt_path=huggingface/mamba2-1.3b-hf       # starting weights: python -m huggingface.download mamba2-1.3b-hf
init_from=pretrained                      # or scratch: random weights
train_config=configs/training/drop/10b_bsz-512k_64k_cos_3e-4_slimpj.json
n_gpus=8
launch=zero1                              # zero1, zero2, zero3 (DeepSpeed), ddp or cpu
proj_name=statex
run_name=

. "$(dirname "$0")/common.sh"
start_training "$@"
