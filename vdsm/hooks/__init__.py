"""Hook scripts: programs of the administrator that run at named points, see docs/hooks.md."""
