"""How EAGLE-1 learns: the verifier's next state, and its distribution (Li et al., 2024, section 4).

The weights are the paper's: 1 for the smooth L1 distance of states, 0.1 for the cross-entropy
against the verifier's distribution. The reference code adds uniform noise to the states.
"""

from speculators.models.objective import ObjectiveSettings

SETTINGS = ObjectiveSettings(steps=1, losses={"ce_soft": 0.1}, smooth_l1=1.0, feature_noise=0.2)
