// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The data plane's programs, one object: each header opens with what its hooks decide. */
#include <linux/bpf.h>

#include "connect.h"
#include "datagram.h"
#include "dns.h"
#include "handoff_option.h"
#include "peer.h"
#include "telemetry.h"
#include "waypoint.h"

/* Keeps in BTF what no map names: user space takes its layout from there. */
struct shared_types {
	struct flow_record flow_record;
	enum reason reason;
	enum direction direction;
	enum flow_kind flow_kind;
	enum address_kind address_kind;
	enum service_flag service_flag;
	enum dns_limit dns_limit;
	enum switch_index switch_index;
	enum handoff_prefix handoff_prefix;
};
const struct shared_types *const volatile shared_types = NULL;

char LICENSE[] SEC("license") = "Dual BSD/GPL";
