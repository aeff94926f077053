"""Checkpoints that are whole, fall between optimiser steps and end a run that is asked to end."""
