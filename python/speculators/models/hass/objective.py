"""How HASS learns: EAGLE-1's losses in harmony with drafting (Zhang et al., 2024, section 3).

Two parts, each of which can be switched off. The harmonised objective adds a loss on the verifier's
ten most likely tokens: ``losses`` without ``topk`` is without it. The harmonised context trains
three steps, each on the states that the step before put out: ``steps=1`` is without it. As in the
reference code, no gradient goes from one step into the one before.
"""

from speculators.models.objective import ObjectiveSettings

SETTINGS = ObjectiveSettings(
    steps=3,
    losses={"ce_soft": 0.1, "topk": 1.0},
    smooth_l1=1.0,
    feature_noise=0.2,
    detach_states=True,
)
