"""Data modules, one dataset a file; ``CustomDataModule`` for data of one's own, ``MixtureDataModule`` for several."""

from datamodules.custom import CustomDataModule
from datamodules.mixture import MixtureDataModule
from datamodules.smoltalk import SmolTalkDataModule
from datamodules.ultrafeedback import UltraFeedbackDataModule

__all__ = ["CustomDataModule", "MixtureDataModule", "SmolTalkDataModule", "UltraFeedbackDataModule"]
