"""Does a larger recurrent state help, which initialisation, and how much: many small models, with seeds.

    bash scripts/recall_study.sh                                  # on one GPU: configs/study/gpu.json
    bash scripts/recall_study.sh config=configs/study/cpu.json    # reduced, on a CPU
    python -m benchmarks.recall_study.report                      # tables, figures, docs/results.md

settings    every size of the study, from a JSON file; their fingerprint
arms        what a base is post-trained as
corpus      text and associative recall as tensors; the batch of a step
measure     recall by number of pairs, held-out loss
runs        one base, one arm, one cost measurement: from a job to a record
store       the JSONL of records
jobs        which jobs are left, in order: a function of the records
pool        worker processes that share the GPU, and the clock of a shard
statistics  mean, 95 % interval, pairing by seed
summary, figures, page, report     from records to docs/results.md
"""
