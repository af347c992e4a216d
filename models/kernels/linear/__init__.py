"""Linear recurrences with a matrix per head as their state.

    S_t = A_t S_{t-1} + k_t u_t^T        o_t = scale * S_t^T q_t

A_t decays the state, per head or per key channel. Plain rules write u_t = v_t. The delta rule has strengths beta_t, and
corrects what the state already holds: u_t = beta_t (v_t - (A_t S_{t-1})^T k_t).
"""
