"""A first run in minutes: does everything that a real run needs work together on this machine?

``python -m lopd.smoke --work DIR [--cpu]`` tries imports, collectives, packed attention, an SGLang
server, two steps of a model with 4 layers, and a weight sync by each transport. On a node of 8 GPUs
the model has the shape of Qwen3-30B-A3B with 4 of its 48 layers, TP4 EP8. With --cpu it is a tiny
model, TP2 EP2 on two processes. Weights are random, so nothing is downloaded.
"""
