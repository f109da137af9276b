"""The one place that holds finetui's version; it stands here because every layer may import the planner."""

VERSION = "0.1.0"
