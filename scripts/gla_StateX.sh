#!/usr/bin/env bash
# StateX post-training of a pretrained GLA model: every drop_prop-th layer gets a larger recurrent state, then the whole
# model trains on long sequences. The published recipe, 8 GPUs by default.
#
#   bash scripts/gla_StateX.sh                                # edit the variables below, or override them here:
#   bash scripts/gla_StateX.sh n_gpus=4 drop_prop=4 drop_mode=extend run_name=my_run
#   bash scripts/gla_StateX.sh plan=true init_from=scratch    # what the run would do, without weights or GPUs
#   bash scripts/gla_StateX.sh scale=tiny                     # the same path on a CPU

model_name=gla-1.3B                       # a file in configs/models
ckpt_path=huggingface/gla-1.3B-100B       # starting weights: python -m huggingface.download gla-1.3B-100B
init_from=pretrained                      # or scratch: random weights
drop_prop=6                               # expand layers 0, 6, 12, ...; must divide the number of layers (24)
drop_mode=gla                             # gla, merge, qk_gla, lora_4 or extend
train_config=configs/training/drop/10b_bsz-512k_64k_cos_3e-4_slimpj.json
n_gpus=8
launch=zero1                              # zero1, zero2, zero3 (DeepSpeed), ddp or cpu
proj_name=statex
run_name=

. "$(dirname "$0")/common.sh"
start_training "$@"
