"""The runtime over HTTP: jobs that survive a crash, OpenAI's videos API, and a page.

Three objects, joined by narrow interfaces: a store of jobs (`jobs.JobStore`), an executor that runs them
(`executor.Executor`), and the HTTP application (`http.app.create_app(store, executor, settings)`). The application
knows no model and no thread; the executor knows no HTTP; the store knows neither.

Not here: pipelines, settings and limits of models (`tmd_runtime`).
"""
