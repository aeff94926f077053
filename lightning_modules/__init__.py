"""The methods, each a LightningModule of its own."""

from lightning_modules.dpo import DPOModule
from lightning_modules.reward import RewardModule
from lightning_modules.rloo import RLOOModule
from lightning_modules.sft import SFTModule
from lightning_modules.untrained import EvaluationModule

__all__ = ["DPOModule", "EvaluationModule", "RLOOModule", "RewardModule", "SFTModule"]
