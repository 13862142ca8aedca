"""The price of a plan: symbolic operation costs, and the objective that ranks them."""
