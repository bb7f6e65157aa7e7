"""Checks of a kustomize overlay beyond its schemas: each check returns what is wrong, as sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from teacher_server.scheduler import CLOSE_SECONDS
from teacher_server.server import STOP_SECONDS

Manifest = dict[str, Any]
MADE_BY_THE_USER = {"logitstream-token", "teacher-tls"}
"""Secrets that base leaves to the user; components/cert-manager makes the second."""
LEAST_STARTUP_SECONDS = 600
SUFFIXES = {
    "": 1.0,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """`Kind/name` of each workload and its pod template."""
    found = {
        f"{manifest['kind']}/{manifest['metadata']['name']}": manifest["spec"]["template"]
        for manifest in of_kind(manifests, "Deployment", "Job")
    }
    for jobset in of_kind(manifests, "JobSet"):
        for job in jobset["spec"]["replicatedJobs"]:
            found[f"JobSet/{jobset['metadata']['name']}-{job['name']}"] = job["template"]["spec"]["template"]
    return found


def selector_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Selectors that select no pod."""
    for workload in of_kind(manifests, "Deployment"):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        if not _selects(workload["spec"]["selector"]["matchLabels"], labels):
            yield f"Deployment {workload['metadata']['name']} does not select its own pods"
    for where, labels in _selectors(manifests):
        if not any(_selects(labels, pod["metadata"]["labels"]) for pod in pod_templates(manifests).values()):
            yield f"{where} selects no pod: {labels}"


def _selectors(manifests: list[Manifest]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for manifest in manifests:
        name, spec = f"{manifest['kind']} {manifest['metadata']['name']}", manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                yield name, spec["selector"]
            case "PodDisruptionBudget" | "PodMonitor":
                yield name, spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                yield name, spec["podSelector"].get("matchLabels", {})
                for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
                    for peer in [*rule.get("from", []), *rule.get("to", [])]:
                        yield name, peer.get("podSelector", {}).get("matchLabels", {})
    for name, pod in pod_templates(manifests).items():
        for constraint in pod["spec"].get("topologySpreadConstraints", []):
            yield name, constraint["labelSelector"]["matchLabels"]


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def port_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Ports by name or number that no selected container opens, and settings that serve on others."""
    pods = pod_templates(manifests)
    for service in of_kind(manifests, "Service"):
        for port in service["spec"]["ports"]:
            if not _opened(pods, service["spec"]["selector"], port["targetPort"]):
                yield f"Service {service['metadata']['name']}: no pod opens {port['targetPort']}"
    for monitor in of_kind(manifests, "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if not _opened(pods, monitor["spec"]["selector"]["matchLabels"], endpoint["port"]):
                yield f"PodMonitor {monitor['metadata']['name']}: no pod opens {endpoint['port']}"
    for policy in of_kind(manifests, "NetworkPolicy"):
        own = policy["spec"]["podSelector"].get("matchLabels", {})
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if not _opened(pods, own, port["port"]):
                    yield f"NetworkPolicy {policy['metadata']['name']}: no pod opens {port['port']}"
    for name, container in _containers(manifests):
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(kind, {})
            port = (probe.get("grpc") or probe.get("httpGet") or {}).get("port")
            if port is not None and port not in _ports(container):
                yield f"{name}: {kind} asks port {port}, which is not open"
    for name, settings, container in _settings(manifests):
        for section, key in (("server", "address"), ("server", "health_address"), ("metrics", "port")):
            value = settings.get(section, {}).get(key)
            if value is not None and int(str(value).rpartition(":")[2]) not in _ports(container):
                yield f"{name}: {section}.{key} is {value}, which the container does not open"


def _opened(pods: Mapping[str, Manifest], selector: Mapping[str, str], port: str | int) -> bool:
    selected = [pod for pod in pods.values() if _selects(selector, pod["metadata"]["labels"])]
    return all(any(port in _ports(container) for container in pod["spec"]["containers"]) for pod in selected)


def _ports(container: Manifest) -> set[str | int]:
    return {port[key] for port in container.get("ports", []) for key in ("name", "containerPort")}


def _containers(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for name, pod in pod_templates(manifests).items():
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield f"{name}/{container['name']}", container


def _settings(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Each main container with the YAML settings that its --config names; a path that is not there gives {}."""
    config_maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in of_kind(manifests, "ConfigMap")}
    for name, pod in pod_templates(manifests).items():
        container = pod["spec"]["containers"][0]
        words = " ".join(container["args"]).replace("--config=", "--config ").split()
        volume, _, key = words[words.index("--config") + 1].strip("/").partition("/")
        sources = {source["name"]: source for source in pod["spec"]["volumes"]}
        data = config_maps.get(sources.get(volume, {}).get("configMap", {}).get("name"), {})
        yield name, yaml.safe_load(data.get(key, "{}")), container


def reference_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Names of objects, volumes and files that are nowhere."""
    made = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    secrets = MADE_BY_THE_USER | {cert["spec"]["secretName"] for cert in of_kind(manifests, "Certificate")}
    for name, pod in pod_templates(manifests).items():
        spec = pod["spec"]
        if ("ServiceAccount", spec["serviceAccountName"]) not in made:
            yield f"{name}: no ServiceAccount {spec['serviceAccountName']}"
        for volume in spec["volumes"]:
            if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in made:
                yield f"{name}: no ConfigMap {volume['configMap']['name']}"
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in made:
                yield f"{name}: no PersistentVolumeClaim {claim}"
            if "secret" in volume and volume["secret"]["secretName"] not in secrets:
                yield f"{name}: no Secret {volume['secret']['secretName']}"
        mounted = {mount["name"] for c in spec["containers"] for mount in c["volumeMounts"]}
        for missing in mounted ^ {volume["name"] for volume in spec["volumes"]}:
            yield f"{name}: volume {missing} is not both mounted and defined"
    for name, settings, container in _settings(manifests):
        if not settings:
            yield f"{name}: --config names a file that no ConfigMap holds"
        yield from _path_problems(name, settings, container)
    for autoscaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        target = autoscaler["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) not in made:
            yield f"the autoscaler scales {target['kind']} {target['name']}, which is not there"


def _path_problems(name: str, settings: Manifest, container: Manifest) -> Iterator[str]:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    for key, value in (
        (f"{section}.{key}", value) for section, part in settings.items() for key, value in part.items()
    ):
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path.startswith("/"):
                mount = next((m for place, m in mounts.items() if path.startswith(f"{place}/")), None)
                if mount is None:
                    yield f"{name}: {key} is {path}, where nothing is mounted"
                elif key in ("cache.path", "training.output_dir") and mount.get("readOnly"):
                    yield f"{name}: {key} is {path}, which is read-only"


def quantity_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Quantities that do not parse, requests above limits, a container without bounds."""
    for name, container in _containers(manifests):
        requests, limits = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
        for resource in {"cpu", "memory"} | set(requests) | set(limits):
            try:
                wanted, most = quantity(requests.get(resource, "")), quantity(limits.get(resource, ""))
            except ValueError as error:
                yield f"{name}: {resource}: {error}"
                continue
            if wanted > most or ("/" in resource and wanted != most):
                yield f"{name}: asks for {requests[resource]} of {resource}, its limit is {limits[resource]}"

    for name, settings, container in _settings(manifests):
        env = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
        threads = int(settings.get("model", {}).get("num_threads") or env.get("OMP_NUM_THREADS") or 0)
        cpus = container["resources"]["limits"]["cpu"]
        if not 0 < threads <= quantity(cpus):
            yield f"{name}: {threads or 'unbounded'} threads, its limit is {cpus} CPUs"


def quantity(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|M|G|Ki|Mi|Gi|Ti|)", text)
    if match is None:
        raise ValueError(f"expected a quantity such as 500m or 4Gi, got {text!r}")
    return float(match[1]) * SUFFIXES[match[2]]


def timing_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Probes and grace periods that do not fit the server's own bounds."""
    for name, settings, container in _settings(manifests):
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if container[kind]["timeoutSeconds"] > container[kind]["periodSeconds"]:
                yield f"{name}: {kind} times out after the next one is due"
        if _patience(container["livenessProbe"]) <= _patience(container["readinessProbe"]):
            yield f"{name}: is killed before it is taken out of service"
        if "drain_seconds" not in settings.get("server", {}):
            continue
        if _patience(container["startupProbe"]) < LEAST_STARTUP_SECONDS:
            yield f"{name}: has {_patience(container['startupProbe'])} s to load, expected {LEAST_STARTUP_SECONDS}"
        pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed = pre_stop + shutdown_seconds(settings["server"]["drain_seconds"])
        grace = pod_templates(manifests)[name]["spec"]["terminationGracePeriodSeconds"]
        if grace < needed:
            yield f"{name}: is killed {grace} s after it is told to stop, and may take {needed} s"


def shutdown_seconds(drain_seconds: float) -> float:
    """Return the most seconds from SIGTERM to the end: draining, gRPC's stop twice, the scheduler's close twice."""
    return drain_seconds + 2 * STOP_SECONDS + 2 * CLOSE_SECONDS


def _patience(probe: Manifest) -> int:
    return int(probe["periodSeconds"]) * int(probe["failureThreshold"])


def rendezvous_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Students that would not find each other or their teacher."""
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(manifests, "Service")}
    jobsets = {jobset["spec"]["network"]["subdomain"] for jobset in of_kind(manifests, "JobSet")}
    jobs = {
        f"Job/{job['metadata']['name']}": (f"{job['metadata']['name']}-0", job) for job in of_kind(manifests, "Job")
    }
    for jobset in of_kind(manifests, "JobSet"):
        for job in jobset["spec"]["replicatedJobs"]:
            prefix = f"{jobset['metadata']['name']}-{job['name']}"
            jobs[f"JobSet/{prefix}"] = (f"{prefix}-0-0", job["template"])
    for name, (first, job) in jobs.items():
        pod = job["spec"]["template"]["spec"]
        env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        size = str(job["spec"]["completions"])
        if not size == str(job["spec"]["parallelism"]) == env["PET_NNODES"]:
            yield f"{name}: completions, parallelism and PET_NNODES differ"
        if env["PET_MASTER_ADDR"] != f"{first}.{pod['subdomain']}":
            yield f"{name}: PET_MASTER_ADDR is {env['PET_MASTER_ADDR']}, the first pod is {first}.{pod['subdomain']}"
        if int(env["PET_MASTER_PORT"]) not in _ports(pod["containers"][0]):
            yield f"{name}: PET_MASTER_PORT is not open"
        names_early = services.get(pod["subdomain"], {}).get("publishNotReadyAddresses")
        if not names_early and pod["subdomain"] not in jobsets:
            yield f"{name}: no headless Service {pod['subdomain']} names pods before they are ready"
    for name, settings, _ in _settings(manifests):
        for host, _, port in (address.partition(":") for address in settings.get("teacher", {}).get("addresses", [])):
            service = services.get(host, {})
            if service.get("clusterIP") != "None" or int(port) not in [p["port"] for p in service.get("ports", [])]:
                yield f"{name}: no headless Service {host} with port {port}"
            certificates = [c for c in of_kind(manifests, "Certificate") if c["spec"]["secretName"] == "teacher-tls"]
            if any(host not in certificate["spec"]["dnsNames"] for certificate in certificates):
                yield f"{name}: the teacher's certificate does not name {host}"


def replica_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Two hands on one number of replicas, and budgets that forbid every eviction."""
    scaled = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in of_kind(manifests, "HorizontalPodAutoscaler")}
    for deployment in of_kind(manifests, "Deployment"):
        name = deployment["metadata"]["name"]
        if (name in scaled) == ("replicas" in deployment["spec"]):
            yield f"Deployment {name}: the number of replicas is to be set by the autoscaler or here, and by one alone"
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        if not budget["spec"].get("maxUnavailable"):
            yield f"PodDisruptionBudget {budget['metadata']['name']}: no pod may ever be evicted"


CHECKS: tuple[Callable[[list[Manifest]], Iterator[str]], ...] = (
    selector_problems,
    port_problems,
    reference_problems,
    quantity_problems,
    timing_problems,
    rendezvous_problems,
    replica_problems,
)
