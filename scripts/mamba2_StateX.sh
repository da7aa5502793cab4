#!/usr/bin/env bash
# StateX post-training of a pretrained Mamba2 model: every drop_prop-th layer gets a larger recurrent state, then the whole
# model trains on long sequences. The published recipe, 8 GPUs by default.
#
#   bash scripts/mamba2_StateX.sh                                # edit the variables below, or override them here:
#   bash scripts/mamba2_StateX.sh n_gpus=4 drop_prop=4 drop_mode=extend run_name=my_run
#   bash scripts/mamba2_StateX.sh plan=true init_from=scratch    # what the run would do, without weights or GPUs
#   bash scripts/mamba2_StateX.sh scale=tiny                     # the same path on a CPU

model_name=mamba2-1.3B                    # a file in configs/models
ckpt_path=huggingface/mamba2-1.3b-hf      # starting weights: python -m huggingface.download mamba2-1.3b-hf
init_from=pretrained                      # or scratch: random weights
drop_prop=6                               # expand layers 0, 6, 12, ... of 48 (+50 % state, as in the paper); 1 expands all
drop_mode=mamba4                          # mamba2, mamba4, merge_copy, merge_zero, lora_4 or extend
train_config=configs/training/drop/10b_bsz-512k_64k_cos_3e-4_slimpj.json
n_gpus=8
launch=zero1                              # zero1, zero2, zero3 (DeepSpeed), ddp or cpu
proj_name=statex
run_name=

. "$(dirname "$0")/common.sh"
start_training "$@"
