"""lopd: distil a large reasoning teacher into a mixture-of-experts student by Lightning OPD
(offline on-policy distillation).
"""

__version__ = "0.1.0"
