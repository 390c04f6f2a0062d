"""How EAGLE-3 learns: the verifier's distribution alone, seven steps deep (Li et al., 2025).

The gradient goes through all steps, and step k counts 0.8 to the power k, as in the reference code.
"""

from speculators.models.objective import ObjectiveSettings

SETTINGS = ObjectiveSettings(steps=7, step_decay=0.8, losses={"kl": 1.0})
