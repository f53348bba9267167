"""`tmd-engine`: inspect, build, verify and doctor."""
