"""Adversarial attacks on any callable from images to logits.

An attack leaves no trace: parameters, their ``.grad``, buffers, train or eval mode and the global
random state are the same before and after.
"""

from calibclip.attacks.pgd import PGD as PGD
from calibclip.attacks.pgd import AttackResult as AttackResult
from calibclip.attacks.pgd import pgd as pgd

__all__ = ["PGD", "AttackResult", "pgd"]
