"""Data modules, one dataset a file."""

from datamodules.smoltalk import SmolTalkDataModule
from datamodules.ultrafeedback import UltraFeedbackDataModule

__all__ = ["SmolTalkDataModule", "UltraFeedbackDataModule"]
