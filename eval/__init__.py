"""Evaluation behind one command: recall, needles, passkeys, in-context learning, MQAR and more.

    python -m eval model=FOLDER[,FOLDER...] [tasks=...] [lengths=...] [limit=N] [output=DIR]

A family of tasks is one file of eval/tasks; docs/evaluation.md describes each of them.
"""
