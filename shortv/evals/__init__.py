"""lmms-eval: its tasks as requests and calibration samples, its scores, and the models `shortv` and `shortv_serve`."""
