"""The stages of the method, one file each. `lopd.pipeline` runs them in order.

This file imports none of them: a rank of SFT or of distillation starts its stage's file as a
program (``python -m lopd.stages.sft JOB.json``), and imports no other stage.
"""
