"""What serving and campaigns gain, measured against lmms-eval and against the endpoint's own capacity."""
