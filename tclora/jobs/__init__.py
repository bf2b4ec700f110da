"""Functions run in processes of their own, and the devices they run on."""
