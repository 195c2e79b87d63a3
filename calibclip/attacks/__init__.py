"""Adversarial attacks on any callable from images to logits.

An attack leaves no trace: parameters, their ``.grad``, buffers, train or eval mode and the global
random state are the same before and after.
"""

from calibclip.attacks import objectives as objectives
from calibclip.attacks.apgd import APGD as APGD
from calibclip.attacks.ensemble import WorstCase as WorstCase
from calibclip.attacks.ensemble import WorstCaseResult as WorstCaseResult
from calibclip.attacks.export import to_uint8 as to_uint8
from calibclip.attacks.foreign import Foreign as Foreign
from calibclip.attacks.foreign import from_foolbox as from_foolbox
from calibclip.attacks.foreign import from_torchattacks as from_torchattacks
from calibclip.attacks.pgd import PGD as PGD
from calibclip.attacks.pgd import pgd as pgd
from calibclip.attacks.result import AttackResult as AttackResult
from calibclip.attacks.result import AttackWarning as AttackWarning
from calibclip.attacks.result import Diagnostics as Diagnostics
from calibclip.attacks.square import Square as Square
from calibclip.attacks.transfer import TransferMatrix as TransferMatrix
from calibclip.attacks.transfer import transfer_matrix as transfer_matrix

__all__ = [
    "APGD",
    "PGD",
    "AttackResult",
    "AttackWarning",
    "Diagnostics",
    "Foreign",
    "Square",
    "TransferMatrix",
    "WorstCase",
    "WorstCaseResult",
    "from_foolbox",
    "from_torchattacks",
    "objectives",
    "pgd",
    "to_uint8",
    "transfer_matrix",
]
