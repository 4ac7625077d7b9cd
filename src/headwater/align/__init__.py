"""Alignment: moving a model toward behaviour that is checked, by a rule, a reward, a judge or a weaker model."""
