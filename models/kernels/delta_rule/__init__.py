"""The gated delta rule: a linear recurrence whose writes correct what the state already holds."""
