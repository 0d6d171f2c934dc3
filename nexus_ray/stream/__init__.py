"""The stream: mixture, permutation and plan (pure), and the loader that lets Ray Data execute the plan."""
