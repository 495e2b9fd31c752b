# Loader workers import this file again under another name: nothing heavy above the guard.
if __name__ == "__main__":
    from dist_trainer.commands.main import main

    main()
